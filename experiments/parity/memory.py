"""Does an SD 1 U-Net take the memory that `ldm.plan` says? python experiments/parity/memory.py [batch ...]

For each batch size a fresh process builds the network with random bfloat16 weights and answers once for 64 x 64 latents
on the CPU; how
far its memory rose above what its imports had taken is set beside the plan's figure. Writes memory.csv here, exits with
1 beyond 15%.
"""

import csv
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PRESET, WITHIN = "sd1", 0.15


def status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measured(batch: int) -> int:
    """Bytes by which this process grew to build the network and to run it once."""
    import torch

    from ldm.condition import Condition
    from ldm.config import build
    from ldm.plan import flops
    from ldm.plan.config import composed
    from ldm.plan.data_info import card_of
    from ldm.plan.placeholders import use_random_weights

    cfg, said = composed([f"preset={PRESET}"])
    use_random_weights(cfg.conditioner)
    with flops.meta_device():
        autoencoder = build.build_autoencoder(cfg.autoencoder, said["channels"])
        conditioner = build.build_conditioner(cfg.conditioner, autoencoder, card_of(cfg, said))
        net = build.build_network(cfg, autoencoder, conditioner).to(torch.bfloat16)
    size = cfg.data.size // autoencoder.factor
    torch.nn.Conv2d(8, 8, 3).bfloat16()(
        torch.zeros(1, 8, 8, 8, dtype=torch.bfloat16)
    )  # the library is loaded with its first use
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = status("VmRSS")
    net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02, generator=generator)
    with torch.no_grad():
        x = torch.randn(batch, autoencoder.z_channels, size, size).bfloat16()
        context = torch.randn(batch, conditioner.cache.length, conditioner.context_dim).bfloat16()
        answer = net(x, torch.full((batch,), 500.0), Condition(context=context))
    assert answer.isfinite().all()
    return status("VmHWM") - before


def main(batches: list[int]) -> int:
    from ldm.plan.__main__ import plan

    found = plan([f"preset={PRESET}"]).memory
    rows = []
    for batch in batches:
        code = [sys.executable, str(Path(__file__).resolve()), "measure", str(batch)]
        took = int(subprocess.run(code, capture_output=True, text=True, check=True).stdout.split()[-1])
        said = found["network in bf16"] + found[f"forward pass of {batch} in bf16"]
        rows.append({"batch": batch, "plan_MiB": said >> 20, "measured_MiB": took >> 20, "ratio": f"{took / said:.3f}"})
        print(rows[-1], flush=True)
    with open(HERE / "memory.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return int(any(abs(float(row["ratio"]) - 1) > WITHIN for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(measured(int(sys.argv[2])))
    else:
        sys.exit(main([int(word) for word in sys.argv[1:]] or [1, 2]))
