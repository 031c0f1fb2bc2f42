"""Mutants of the simulator's steps that are planned ahead."""

from mutant import Mutant

S = "runtime/sim/"
WORKER, POLICY = "tests/sim/test_simulator.py::test_async_scheduling_", "tests/scheduler/test_running_first.py::"

SIMULATOR = (
    Mutant(
        "no step is planned ahead",
        f"{S}worker.py",
        "        if self._plans_ahead:\n",
        "        if False:\n",
        (f"{WORKER}delays_a_prompt_by_the_step_planned_before_it_arrived",),
    ),
    Mutant(
        "pipelines plan ahead too",
        f"{S}modes.py",
        "return self.async_scheduling and len(self.stage_shares) == 1",
        "return self.async_scheduling",
        (f"{WORKER}has_no_effect_in_pipelines_and_in_strict_mode",),
    ),
    Mutant(
        "a request that ends with a pending step is planned",
        f"{S}baselines/running_first.py",
        "if num_tokens <= 0 or self._ends_before(length, request):",
        "if num_tokens <= 0:",
        (f"{POLICY}test_async_scheduling_plans_tokens_that_are_still_computed",),
    ),
    Mutant(
        "tokens of pending steps are unknown",
        f"{S}baselines/running_first.py",
        "return request.total_tokens + self.num_coming.get(request.request_id, 0)",
        "return request.total_tokens",
        (f"{POLICY}test_async_scheduling_decides_as_if_tokens_were_known_when_planned",),
    ),
    Mutant(
        "blocks of an ended request wait for a step without it",
        f"{S}baselines/running_first.py",
        "if request not in in_steps:",
        "if not self._pending:",
        (f"{POLICY}test_async_scheduling_continues_a_prompt_and_frees_an_ended_request_at_once",),
    ),
)
