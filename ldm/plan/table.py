"""Format a plan as a table."""

from collections.abc import Mapping

from ldm.plan.cost import PlanResult


def table(plan: PlanResult) -> str:
    """Format the figures of a plan for a terminal."""
    lines: list[str] = []

    def section(title: str, rows: Mapping[str, str]) -> None:
        lines.extend(["", title, *(f"  {name:<38}{value:>16}" for name, value in rows.items())])

    counts = {
        name: f"{part['parameters']:,}" + ("" if part["trained"] else " frozen") for name, part in plan.parts.items()
    }
    section("parameters", counts)
    if "parameters" in plan.published:
        theirs, parts = plan.published["parameters"], " + ".join(plan.published["modules"])
        same = "the same" if counts_match(plan.published_count, theirs) else f"ours has {plan.published_count:,}"
        printed = theirs if isinstance(theirs, str) else format(theirs, ",")
        lines.append(f"  {plan.published['table']} ({parts}): {printed}, {same}")
    section("FLOPs", {name: format_si(value, "FLOP") for name, value in plan.flops.items()})
    names = ("weights", "frozen weights", "gradients", "optimizer", "average")
    section("memory of training, each device", {name: format_bytes(plan.memory[name]) for name in names})
    fixed = sum(plan.memory[name] for name in names if name != "gradients")
    for precision, costs in plan.activations.items():
        for batch, cost in costs.items():
            activations = format_bytes(cost["saved_for_backward"])
            total = format_bytes(fixed + cost["peak"])
            lines.append(f"  precision {precision}, batch {batch}: activations {activations}, in all {total}")
    section(
        "memory of sampling, in addition to the weights",
        {n: format_bytes(v) for n, v in plan.memory.items() if n not in names},
    )
    if plan.text_features:
        what = {"memory": "memory, each device", "disk": "disk", "online": "online, memory of a batch"}
        rows = {what[name]: format_bytes(value) for name, value in plan.text_features.items()}
        count = "" if plan.data.captions is None else f" of {plan.data.captions:,} captions"
        section(f"text features{count}, at most, by training.text_features", rows)
    section("disk", {name: format_bytes(value) for name, value in plan.disk.items()})
    training = {
        "steps": f"{plan.steps:,}",
        "batch, all devices": f"{plan.batch_size:,}",
        "images seen": f"{plan.images:,}",
    }
    training |= {"passes over the data": f"{plan.images / plan.data.images:.3g}"}
    training |= {"compute": format_si(plan.flops["training, an image"] * plan.images, "FLOP")}
    training |= {"latent": " x ".join(map(str, plan.z)), "data": f"{plan.data.images:,} of {plan.data.name}"}
    if plan.device_hours is not None:
        training["device-hours"] = f"{plan.device_hours:,.1f}"
    section("training", training)
    if plan.differences:
        lines.extend(["", "differs from the paper's", *(f"  {line}" for line in plan.differences)])
    return "\n".join(lines[1:])


def counts_match(count: int, printed: int | str) -> bool:
    """Return whether a count equals the printed one: exactly, or, for text such as 390.89M, to its last decimal."""
    if not isinstance(printed, str):
        return count == printed
    decimals = len(printed.rstrip("M").partition(".")[2])
    return f"{count / 1e6:.{decimals}f}M" == printed


def format_si(value: float, unit: str) -> str:
    """Format a value with an SI prefix and four significant digits."""
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if value < 1000:
            return f"{value:.4g} {prefix}{unit}"
        value /= 1000
    return f"{value:.4g} Y{unit}"


def format_bytes(value: float) -> str:
    """Format bytes with a binary prefix and four significant digits."""
    for prefix in ("", "Ki", "Mi", "Gi"):
        if value < 1024:
            return f"{value:.4g} {prefix}B"
        value /= 1024
    return f"{value:,.4g} TiB"
