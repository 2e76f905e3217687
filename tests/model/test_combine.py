"""The examples-weighted mean, per element over those who hold it."""

from dataclasses import dataclass, field

import pytest
import torch

from methods.lora import Lora
from testbed.errors import WireError
from testbed.method import Part, State
from testbed.model.combine import state_hash, weighted_mean
from testbed.updates import check_finite


@dataclass
class Sent:
    client: int
    examples: int
    parts: dict
    scalars: dict = field(default_factory=dict)

    @property
    def names(self):
        return tuple(self.parts)

    def read(self, name):
        return self.parts[name]


def whole(*values):
    return Part(torch.tensor(values))


def test_examples_weigh_and_what_nobody_holds_keeps_its_value():
    current = {"a": torch.tensor([9.0, 9.0]), "b": torch.tensor([7.0]), "c": torch.tensor([5.0])}
    received = [
        Sent(0, 1, {"a": whole(0.0, 4.0), "b": whole(1.0)}),
        Sent(1, 3, {"a": whole(4.0, 0.0)}),
        Sent(2, 0, {"c": whole(100.0)}),
    ]
    mean = weighted_mean(current, received)
    assert mean["a"].tolist() == [3.0, 1.0]
    assert mean["b"].tolist() == [1.0]
    assert mean["c"].tolist() == [5.0]


def test_slices_are_averaged_over_their_holders():
    current = {"w": torch.full((3, 4), -1.0)}
    received = [
        Sent(0, 1, {"w": Part(torch.full((2, 2), 2.0), ((0, 2), (0, 2)))}),
        Sent(1, 3, {"w": Part(torch.full((2, 4), 6.0), ((1, 3), (0, 4)))}),
    ]
    mean = weighted_mean(current, received)["w"]
    assert mean.tolist() == [[2, 2, -1, -1], [5, 5, 6, 6], [6, 6, 6, 6]]


def test_slices_that_go_on_around_the_end_of_an_axis():
    current = {"w": torch.full((3, 4), -1.0)}
    corners = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    received = [
        Sent(0, 1, {"w": Part(corners, ((2, 4), (3, 5)))}),
        Sent(1, 3, {"w": Part(torch.full((1, 4), 5.0), ((2, 3), (0, 4)))}),
    ]
    mean = weighted_mean(current, received)["w"]
    assert mean.tolist() == [[4, -1, -1, 3], [-1, -1, -1, -1], [4.25, 5, 5, 4]]


@pytest.mark.parametrize("ranges", [((0, 3), (0, 4)), ((1, 4), (3, 7)), ((2, 5), (2, 6))])
def test_a_whole_tensor_turned_around_is_every_element_once(ranges):
    value = torch.arange(12.0).view(3, 4)
    turned = value.roll([-start for start, _ in ranges], (0, 1))
    received = [Sent(client, 2, {"w": Part(turned, ranges)}) for client in range(2)]
    check_update({"w": value}, received[0])
    assert torch.equal(weighted_mean({"w": torch.zeros(3, 4)}, received)["w"], value)


def test_the_type_stays_and_equal_updates_change_nothing():
    value = torch.randn(50).to(torch.bfloat16)
    mean = weighted_mean({"w": value}, [Sent(client, client + 1, {"w": Part(value)}) for client in range(5)])
    assert mean["w"].dtype == torch.bfloat16
    assert torch.equal(mean["w"], value)


def check_update(current, update):
    """What the round loop asks of every update before it is combined."""
    Lora().verify(State(current), update)
    check_finite(update)


@pytest.mark.parametrize(
    "part",
    [
        Part(torch.zeros(3)),
        Part(torch.zeros(2), ((0, 3),)),
        Part(torch.zeros(2), ((4, 6),)),
        Part(torch.zeros(5), ((3, 8),)),
        Part(torch.zeros(1), ((3, 5),)),
        Part(torch.zeros(0), ((5, 5),)),
        Part(torch.zeros(2), ((-1, 1),)),
        Part(torch.zeros(2), ()),
    ],
)
def test_a_piece_that_does_not_fit_is_refused(part):
    current = {"w": torch.zeros(4)}
    with pytest.raises(WireError, match="client 3: w"):
        weighted_mean(current, [Sent(3, 1, {"w": part})])
    with pytest.raises(WireError, match="client 3: w"):
        check_update(current, Sent(3, 1, {"w": part}))


def test_unknown_and_diverged_tensors_are_refused():
    current = {"w": torch.zeros(2)}
    for update in (Sent(3, 1, {"v": whole(1.0, 2.0)}), Sent(3, 1, {"w": whole(1.0, float("nan"))})):
        with pytest.raises(WireError, match="client 3"):
            check_update(current, update)
    with pytest.raises(WireError, match="client 3 sent v"):
        weighted_mean(current, [Sent(3, 1, {"v": whole(1.0, 2.0)})])
    check_update(current, Sent(3, 1, {"w": whole(1.0, 2.0)}))


def test_a_state_has_one_hash_whatever_its_order():
    a, b = torch.arange(3.0), torch.zeros(2, 2)
    one = state_hash({"a": a, "b": b}, {"x": 1, "y": [2]})
    assert one == state_hash({"b": b, "a": a}, {"y": [2], "x": 1})
    others = [({"a": a}, {"x": 1}), ({"a": a + 1, "b": b}, {"x": 1}), ({"a": a, "b": b.view(4)}, {"x": 1, "y": [2]})]
    assert one not in {state_hash(tensors, scalars) for tensors, scalars in others}
