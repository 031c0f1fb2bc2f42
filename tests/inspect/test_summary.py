"""Changes of models between two generated trees: equal ones share a line."""

from sageLLM.runtime.inspect.summary import StageSummary, diff_lines

OLD = {
    name: {
        "prefill": StageSummary(10, kernels, 1000 * kernels, 400),
        "decode": StageSummary(9, kernels, 100 * kernels, 40),
    }
    for name, kernels in (("a", 10), ("b", 20), ("c", 30), ("d", 40))
}


def changed(name: str, **stages: StageSummary) -> dict[str, dict[str, StageSummary]]:
    return {name: OLD[name] | stages}


def test_models_with_the_same_change_share_a_line() -> None:
    new = OLD | {
        name: {
            stage: StageSummary(one.nodes, one.kernels - 2, one.flops * 11 // 10, one.bytes)
            for stage, one in OLD[name].items()
        }
        for name in ("a", "b", "c")
    }
    new |= changed("d", decode=StageSummary(8, 40, 4000, 44))
    assert diff_lines(OLD, new) == [
        "3 models, prefill, decode: kernels -2, flops +10.0%: a, b, c",
        "model d, decode: nodes 9 -> 8 (-11.1%), bytes 40 -> 44 (+10.0%)",
    ]


def test_a_model_with_another_share_of_the_change_has_its_own_lines() -> None:
    new = OLD | changed("a", decode=StageSummary(9, 10, 2000, 40)) | changed("b", decode=StageSummary(9, 20, 3000, 40))
    assert diff_lines(OLD, new) == [
        "model a, decode: flops 1,000 -> 2,000 (+100.0%)",
        "model b, decode: flops 2,000 -> 3,000 (+50.0%)",
    ]


def test_new_and_removed_models_and_stages() -> None:
    new = {"e": OLD["a"], **{name: stages for name, stages in OLD.items() if name != "d"}}
    new["c"] = new["c"] | {"hybrid": StageSummary(1, 1, 1, 1)}
    assert diff_lines(OLD, new) == ["model e: new", "model d: removed", "model c: new stage hybrid"]
    assert diff_lines(OLD, OLD) == []
