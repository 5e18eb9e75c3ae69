"""A plan for people to read."""

from collections.abc import Mapping

from ldm.plan.cost import PlanResult


def table(found: PlanResult) -> str:
    """The figures for people to read."""
    lines: list[str] = []

    def section(title: str, rows: Mapping[str, str]) -> None:
        lines.extend(["", title, *(f"  {name:<38}{value:>16}" for name, value in rows.items())])

    whole = {
        name: f"{part['parameters']:,}" + ("" if part["trained"] else " frozen") for name, part in found.parts.items()
    }
    section("parameters", whole)
    if "parameters" in found.published:
        theirs, parts = found.published["parameters"], " + ".join(found.published["modules"])
        same = "the same" if counts_match(found.published_count, theirs) else f"ours has {found.published_count:,}"
        lines.append(
            f"  {found.published['table']} ({parts}): {theirs if isinstance(theirs, str) else format(theirs, ',')}, {same}"
        )
    section("FLOPs", {name: format_si(value, "FLOP") for name, value in found.flops.items()})
    names = ("weights", "frozen weights", "gradients", "optimizer", "average")
    section("memory of training, each device", {name: format_bytes(found.memory[name]) for name in names})
    fixed = sum(found.memory[name] for name in names if name != "gradients")
    for precision, costs in found.activations.items():
        for batch, cost in costs.items():
            what = f"precision {precision}, batch {batch}: activations {format_bytes(cost['saved_for_backward'])}, in all {format_bytes(fixed + cost['peak'])}"
            lines.append(f"  {what}")
    section(
        "memory of sampling, beside the weights",
        {n: format_bytes(v) for n, v in found.memory.items() if n not in names},
    )
    section("disk", {name: format_bytes(value) for name, value in found.disk.items()})
    seen = {
        "steps": f"{found.steps:,}",
        "batch, all devices": f"{found.batch_size:,}",
        "images seen": f"{found.images:,}",
    }
    seen |= {"passes over the data": f"{found.images / found.data.images:.3g}"}
    seen |= {"compute": format_si(found.flops["training, an image"] * found.images, "FLOP")}
    seen |= {"latent": " x ".join(map(str, found.z)), "data": f"{found.data.images:,} of {found.data.name}"}
    if found.device_hours is not None:
        seen["device-hours"] = f"{found.device_hours:,.1f}"
    section("training", seen)
    if found.differences:
        lines.extend(["", "differs from the paper's", *(f"  {one}" for one in found.differences)])
    return "\n".join(lines[1:])


def counts_match(count: int, printed: int | str) -> bool:
    """Whether a count is the one printed: exactly, or as 390.89M to its last decimal."""
    if not isinstance(printed, str):
        return count == printed
    decimals = len(printed.rstrip("M").partition(".")[2])
    return f"{count / 1e6:.{decimals}f}M" == printed


def format_si(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if value < 1000:
            return f"{value:.4g} {prefix}{unit}"
        value /= 1000
    return f"{value:.4g} Y{unit}"


def format_bytes(value: float) -> str:
    for prefix in ("", "Ki", "Mi", "Gi"):
        if value < 1024:
            return f"{value:.4g} {prefix}B"
        value /= 1024
    return f"{value:,.4g} TiB"
