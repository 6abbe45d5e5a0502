"""Profiles that torch.profiler exports: what share of the training time some events take."""

import json


def covered(trace, chosen):
    """Percentage of the time between the first and the last optimizer step of a trace during which
    at least one chosen event was under way.

    trace: Path of a Chrome trace as JSON; chosen: event (dict) -> whether it counts.
    """
    content = json.loads(trace.read_text())
    events = [event for event in content["traceEvents"] if "dur" in event]
    events.sort(key=start_of)
    steps = [event for event in events if is_optimizer_step(event)]
    start = steps[0]["ts"]
    end = steps[-1]["ts"]

    total = 0
    counted_until = start  # so that the time of overlapping events counts once
    for event in events:
        if chosen(event):
            first = max(event["ts"], counted_until)
            last = min(event["ts"] + event["dur"], end)
            total += max(0, last - first)
            counted_until = max(counted_until, last)
    return 100 * total / (end - start)


def start_of(event):
    return event["ts"]


def is_optimizer_step(event):
    """Whether the host ran a step; an annotation of the same name tells when the GPU did."""
    on_device = event.get("cat") == "gpu_user_annotation"
    return event["name"].startswith("Optimizer.step") and not on_device
