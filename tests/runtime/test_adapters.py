"""LoRA adapters: parked and offloaded requests keep their place among those of a batch."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from test_equal_outputs import assert_nothing_is_left

from econoserve.patches.scheduler_loop import ParkingScheduler

WORKER = Path(__file__).parent / "adapters.py"


def test_requests_with_adapters_park_and_move_and_change_no_output(tmp_path):
    output = tmp_path / "answers.json"
    run = subprocess.run(
        [sys.executable, str(WORKER), str(output), str(tmp_path / "adapters")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    result = json.loads(output.read_text())
    assert result["together"] == result["alone"]
    # Requests of one prompt: each adapter has its own idea of what follows.
    assert len({tuple(ids[:20]) for ids in result["alone"][:5]}) == len(set(result["adapters"]))
    state = result["state"]
    assert_nothing_is_left(state)
    assert min(state["total_parked"], state["total_offloaded"]) > 0, state
    assert state["total_planning_errors"] == state["total_allocation_failures"] == 0, state


def test_adapters_of_parked_requests_keep_their_places():
    scheduler = object.__new__(ParkingScheduler)
    scheduler.parked = {"parked": SimpleNamespace(lora_id="french")}
    scheduler.lora_drainer, scheduler.enable_lora_overlap_loading = None, False
    manager = SimpleNamespace(validate_lora_batch=lambda adapters: len(adapters) <= 2)
    scheduler.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager))

    def fits(adapter, running):
        return scheduler.can_schedule_lora_req(SimpleNamespace(lora_id=adapter), running)

    assert fits("french", {"german", "latin"}), "its place is kept"
    assert fits("german", set())
    assert not fits("german", {"latin"}), "the parked one could not come back"
