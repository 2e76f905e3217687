"""Runs of the methods that slice widths, with a width for each client, and the same for their references."""

from __future__ import annotations

from testbed.method import Submodel
from tests.contract.harness import given
from tests.reference.driver import data_of, finished, float64_run, largest_difference, rates_of, started


def with_widths(run, *widths):
    """The run with these widths, one for each client."""
    return given(run, [Submodel(run.plan.clients[0].submodel.blocks, width) for width in widths])


def difference(reference, method, folder, widths, *, mutation=None, **config):
    """How far the method's result is from the reference's, on the small ResNet in float64."""
    run = with_widths(float64_run(method, folder, **config), *widths)
    expected = reference.run(
        {}, started(run).tensors, data_of(run), run.config.rounds,
        ratios=widths, learning_rates=[method.rate_scale * rate for rate in rates_of(run)], mutation=mutation,
    )  # fmt: skip
    return largest_difference(finished(run).tensors, expected)
