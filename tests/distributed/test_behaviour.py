"""What users of data-parallel wrappers have filed complaints about, each on real ranks."""

from collections.abc import Callable

import pytest
import torch

Pool = Callable[[int], "Ranks"]  # noqa: F821 - conftest's, which tests cannot import


@pytest.mark.parametrize("bucket_cap_mb", [25.0, 0.00001])
def test_every_kind_of_parameter(ranks: Pool, bucket_cap_mb: float) -> None:
    assert ranks(2).run("kinds_of_parameters", bucket_cap_mb=bucket_cap_mb) == [[], []]


def test_sparse_gradients(ranks: Pool) -> None:
    assert ranks(2).run("sparse_gradients") == [[], []]


def test_freezing_and_unfreezing(ranks: Pool) -> None:
    """What is frozen does not travel."""
    layer = 6 * 6 + 8
    for different, sizes in ranks(2).run("frozen_and_unfrozen"):
        assert different == []
        assert sizes == [3 * layer, layer, 2 * layer, 3 * layer]


@pytest.mark.parametrize(("bucket_cap_mb", "each"), [(0, [1] * 6), (25.0, [6])])
def test_a_capacity_of_nothing_is_a_bucket_for_each(
    ranks: Pool, bucket_cap_mb: float, each: list[int]
) -> None:
    assert ranks(2).run("gradients_in_a_bucket", bucket_cap_mb=bucket_cap_mb) == [each, each]


def test_a_gradient_kept_while_frozen_is_clipped_with_the_others(ranks: Pool) -> None:
    for seen, expected in ranks(2).run("frozen_with_a_gradient"):
        assert seen == pytest.approx(expected, rel=1e-6)


def test_a_model_may_be_converted_after_wrapping(ranks: Pool) -> None:
    assert ranks(2).run("converted_after_wrapping") == [[], []]


def test_gradients_from_no_sync_alone_are_averaged(ranks: Pool) -> None:
    assert ranks(2).run("used_only_under_no_sync") == [[], []]


@pytest.mark.parametrize("static_graph", [False, True])
def test_unused_parameters_differ_by_rank(ranks: Pool, static_graph: bool) -> None:
    assert ranks(2).run("unused_differently", static_graph=static_graph) == [[], []]


def test_a_static_graph_that_changes_is_an_error(ranks: Pool) -> None:
    for error in ranks(2).run("changed_static_graph"):
        assert "'layers.b.weight' (number 2), 'layers.b.bias' (number 3)" in error
        assert "leave static_graph out" in error


def test_a_static_graph_runs_reentrant_checkpoints_twice(ranks: Pool) -> None:
    assert ranks(2).run("reentrant_twice") == [[], []]


def test_gradients_of_their_own(ranks: Pool) -> None:
    assert ranks(2).run("gradients_of_their_own") == [([], True, 0)] * 2


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_a_narrow_wire(ranks: Pool, dtype: torch.dtype) -> None:
    assert ranks(2).run("narrow_wire", dtype=dtype) == [([], True, {dtype})] * 2


def test_clipping_over_a_narrow_wire(ranks: Pool) -> None:
    for seen, expected in ranks(2).run("clipped_over_a_narrow_wire"):
        assert seen == pytest.approx(expected, rel=1e-6)


def test_torchs_communication_hook(ranks: Pool) -> None:
    """fp16 before the sum: 2^-11 for each rounding, of which there are three."""
    for errors in ranks(2).run("torchs_hook"):
        assert 0 < max(errors) < 3 * 2**-11


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("hook_of_a_list", "must hold the reduced tensor; received list"),
        ("two_hooks", "one communication hook, registered once"),
    ],
)
def test_wrong_hooks_are_refused(ranks: Pool, task: str, message: str) -> None:
    for error in ranks(2).errors(task):
        assert message in str(error)


def test_our_hook_serves_ddp(ranks: Pool) -> None:
    assert ranks(2).run("our_hook_for_ddp") == [[], []]


@pytest.mark.parametrize("how", ["copy", pytest.param("pickle", marks=pytest.mark.slow)])
def test_copies_train(ranks: Pool, how: str) -> None:
    assert ranks(2).run("copies_train", how=how) == [[], []]


def test_one_dimension_of_a_mesh(ranks: Pool) -> None:
    """Ranks 0 1 / 2 3: along "outer" 0 and 2 average, along "inner" 0 and 1."""
    assert ranks(4).run("one_dimension_of_a_mesh") == [[1, 0.5], [2, 0.5], [1, 2.5], [2, 2.5]]


def test_graphs_of_gradients(ranks: Pool) -> None:
    for different, said, has_graph in ranks(2).run("graph_of_gradients"):
        assert different == []
        assert "torch.autograd.grad(..., create_graph=True)" in said
        assert not has_graph


def test_buckets_follow_the_first_backward_of_rank_zero(ranks: Pool) -> None:
    (different, first, last), other = ranks(2).run("agreed_order")
    assert different == other[0] == []
    assert first == other[1] == [5, 4, 3, 2, 1, 0]
    # b's gradients came first, then a's, then c's.
    assert last == other[2]
    assert [number // 2 for number in last] == [1, 1, 0, 0, 2, 2]


@pytest.mark.parametrize(("even", "alone"), [(False, 1.0), (True, 2.0)])
def test_uneven_inputs(ranks: Pool, even: bool, alone: float) -> None:
    """Two micro-batches a step; in rank 1's third and last step it is alone."""
    scale = 1 / (1 + 1e-5) ** 0.5
    (shorter, same), (longer, also) = ranks(2).run("uneven_inputs", even=even)
    assert same
    assert also
    assert shorter == [round(2 * scale, 4)] * 2
    assert longer == [*shorter, round(alone * scale, 4)]


@pytest.mark.parametrize("which", ["inside", "around"])
def test_compiled_models(ranks: Pool, which: str) -> None:
    assert ranks(2).run("compiled", which=which) == [[], []]


def test_two_forwards_in_evaluation(ranks: Pool) -> None:
    assert ranks(2).run("two_forwards_in_evaluation") == [[], []]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ("nothing", None),
        ("one bit", "2.weight"),
        ("places", "2.weight"),
        ("a sign of zero", "1.bias"),
        ("a flag", "flags"),
        ("a phase", "waves"),
    ],
)
def test_ranks_that_differ_by_a_bit_are_found_on_request(
    ranks: Pool, change: str, where: str | None
) -> None:
    for said in ranks(2).run("replicas_are_checked", change=change):
        if where is None:
            assert said is None
        else:
            assert f"rank 1 differs from rank 0 in 1 of 10, such as {where!r}" in said
