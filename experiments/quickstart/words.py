"""Words the model was never told: python experiments/quickstart/words.py [RUN] [prompts|prompts_more|prompts_dev].

Held-out prompts, 16 draws each, beside what the nearest training caption tells.
"""

import csv
import sys
from functools import partial
from pathlib import Path

import torch

from ldm.checkpoint.load import load_data_card, load_model, load_run_config
from ldm.conditioner.text import nearest_caption
from ldm.diffusion.guidance import cfg
from ldm.evaluation import evaluator
from ldm.io.images import to_uint8
from ldm.runs.folder import find_run
from ldm.sampling.tasks import txt2img

HERE = Path(__file__).parent


def main(
    run: str = str(HERE), name: str = "prompts", num: int = 16, scale: float = 4.0, low: float = 0.0, high: float = 1.0
) -> None:
    """Write <name>_drawn.csv: for each prompt the share of draws that the judge calls right, and whether the nearest
    caption is.
    """
    folder = find_run(run)
    card, model = load_data_card(folder), load_model(run)
    score, _ = evaluator.make_scorer(load_run_config(folder), load_run_config(folder).metrics)
    net = score().net
    rows = list(csv.DictReader((HERE / f"{name}.csv").read_text(encoding="utf-8").splitlines()))
    wanted = [list(card.classes).index(row["label"]) for row in rows]
    told = [row["prompt"] for row in rows]
    near = nearest_caption(model.conditioner.cache.encoder, told, card.captions)
    guidance = partial(cfg, interval=(float(low), float(high)))
    images = txt2img(model, told, num=int(num), seed=3_000_000, scale=float(scale), guidance=guidance)
    with torch.no_grad():
        seen = net.classify(net(to_uint8(images))).argmax(1).unflatten(0, (len(rows), int(num)))
    for row, k, n, draws in zip(rows, wanted, near, seen, strict=True):
        row |= {"drawn": f"{(draws == k).double().mean().item():.4f}", "nearest_caption": int(n == k)}
        print(
            f"{row['prompt']:<24}{row['label']:<12} drawn {float(row['drawn']):6.1%}   nearest {'right' if n == k else card.classes[n]}"
        )
    with open(HERE / f"{name}_drawn.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    drawn = sum(float(row["drawn"]) for row in rows) / len(rows)
    right = sum(row["nearest_caption"] for row in rows) / len(rows)
    print(f"drawn right {drawn:.1%}   nearest caption right {right:.1%}   chance {1 / len(card.classes):.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
