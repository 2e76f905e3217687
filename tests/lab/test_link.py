import pytest

from testbed.errors import UsageError
from testbed.lab.link import LinkShape, parse_bandwidth, parse_delay, parse_loss

GOOD = [
    (parse_bandwidth, "20mbit", 20_000_000),
    (parse_bandwidth, "1.5 Gbit", 1_500_000_000),
    (parse_bandwidth, "500kbit", 500_000),
    (parse_delay, "50ms", 0.05),
    (parse_delay, "0.5s", 0.5),
    (parse_delay, "250us", 0.00025),
    (parse_loss, "1%", 0.01),
    (parse_loss, "0.1 %", 0.001),
]


@pytest.mark.parametrize(("parse", "text", "value"), GOOD)
def test_human_units_become_base_units(parse, text, value):
    assert parse(text) == pytest.approx(value)


BAD = [
    (parse_bandwidth, "20", 'a bandwidth such as "20mbit"'),
    (parse_bandwidth, "20MB/s", 'a bandwidth such as "20mbit"'),
    (parse_bandwidth, "100bit", 'at least "8kbit"'),
    (parse_delay, "50", 'a delay such as "50ms"'),
    (parse_delay, "-1ms", 'a delay such as "50ms"'),
    (parse_loss, "0.01", 'a loss such as "1%"'),
    (parse_loss, "100%", "testbed lab cut HOST"),
]


@pytest.mark.parametrize(("parse", "text", "told"), BAD)
def test_anything_else_is_refused_with_an_example(parse, text, told):
    with pytest.raises(UsageError) as error:
        parse(text)
    assert told in str(error.value)
    assert f'"{text}"' in str(error.value)


def test_a_shape_is_told_in_words():
    assert str(LinkShape(20_000_000, 0.05, 0.01)) == "20 Mbit/s, 50 ms each way, 1 % lost"
    assert str(LinkShape()) == "unshaped"
