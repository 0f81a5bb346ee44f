"""A policy in a loop of your own, without an engine: what a runner does, and what it reports.

``python examples/own_loop.py`` runs ``plus``, or another policy that you name. Where an engine
would compute, this loop only counts; docs/scheduling.md lists the rules that it follows.
"""

import itertools
import random
import sys
from dataclasses import dataclass, replace

from econoserve.core.lengths import LengthPrediction
from econoserve.core.types import Launch, Outcome, Preemption, Prefilled, Task, View
from econoserve.policies import make_policy

ROWS, LENGTHS = 16, (10, 20, 30, 40, 60, 80, 110, 150)


@dataclass
class Request:
    task: Task
    length: int  # The true one; the policy knows only task.prediction.
    produced: int = 0
    held: int = 0  # KVC, also while it is parked.
    offloaded: int = 0  # KVC in host memory.
    outcome: Outcome | None = None


def serve(policy, requests, capacity_tokens):
    """Serve requests, all there at the beginning; returns the most KVC that was in use."""
    live, running, peak = {request.task.rid: request for request in requests}, [], 0

    def end(rid, outcome):
        live.pop(rid).outcome = outcome
        policy.remove(rid, outcome)

    for request in requests:
        policy.add(request.task)
    for iteration in itertools.count():
        if not live:
            return peak
        used = sum(request.held for request in live.values())
        rows = ROWS - sum(request.held > 0 for request in live.values())
        plan = policy.plan(View(iteration * 0.02, capacity_tokens, used, rows, max_running=ROWS))

        # Who leaves. What gives its KVC up is requeued before on_launch, its output as prompt.
        for rid, how in plan.preempt:
            request, task = live[rid], live[rid].task
            if how is Preemption.OFFLOAD:
                request.offloaded, request.held = request.held, 0
            elif how is Preemption.RECOMPUTE:
                prompt_tokens = task.prompt_tokens + request.produced - task.generated_tokens
                request.task = replace(
                    task, prompt_tokens=prompt_tokens, generated_tokens=request.produced
                )
                request.held = 0
                policy.requeue(request.task)
        for rid, _reason in plan.reject:
            end(rid, Outcome.REJECTED)

        # One forward pass: all that run take a KVC token each, unless they are to sit it out; then
        # the parts of prompts.
        left = dict(plan.preempt)
        running = [rid for rid in running if rid in live and rid not in left]
        running.extend(plan.resume)
        for rid in plan.resume:
            live[rid].held, live[rid].offloaded = live[rid].held + live[rid].offloaded, 0
        decoded = () if plan.pauses else tuple(running)
        for rid in decoded:
            live[rid].held += 1
        parts = []
        for rid, tokens in plan.prefill:
            live[rid].held += tokens
            done = live[rid].held == live[rid].task.prompt_tokens
            parts.append(Prefilled(rid, tokens, cached_tokens=0, done=done))
        launch = Launch(
            prefilled=tuple(parts),
            resumed=plan.resume,
            parked=tuple(rid for rid, how in left.items() if how is Preemption.PARK),
            offloaded=tuple(rid for rid, how in left.items() if how is Preemption.OFFLOAD),
            decoded=decoded,
        )
        policy.on_launch(plan, launch)
        used = sum(request.held for request in live.values())
        peak = max(peak, used)
        if plan.prefill or plan.resume or left:
            print(
                f"{iteration:4} KVC {used}, {len(decoded)} decode, prompts {plan.prefill}", end=""
            )
            print(f", joining {plan.resume}, leaving {[(r, how.value) for r, how in left.items()]}")

        # What comes out: a token of each that decoded, and the next one of each finished prompt.
        for rid in (*decoded, *(part.rid for part in parts if part.done)):
            live[rid].produced += 1
            policy.on_tokens(rid, 1)
            if live[rid].produced == live[rid].length:
                end(rid, Outcome.FINISHED)
        # Call policy.on_iteration(work, elapsed_s) here if you measure: EconoServe then learns
        # the size of a forward pass. Here the coefficients that it assumes at first stay.


def some_requests(count, seed=1):
    """Requests that fit into a KVC of 400 one by one, as any request must."""
    draw = random.Random(seed)
    prediction = LengthPrediction(LENGTHS, level=0.5, cap_tokens=200)
    return [
        Request(Task(f"r{number}", 0.0, draw.randint(20, 120), prediction), draw.choice(LENGTHS))
        for number in range(count)
    ]


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "plus"
    most = serve(make_policy(name, 400), some_requests(12), 400)
    print(f"{name}: all ended, at most {most} of 400 tokens in use")
