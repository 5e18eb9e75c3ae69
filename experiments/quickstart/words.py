"""Words the model was never told: python experiments/quickstart/words.py [RUN], twenty held-out prompts, 16 draws each, beside what words alone can tell."""

import csv
import sys
from pathlib import Path

import torch

from ldm.conditioner.text import nearest_caption
from ldm.load import DataCard, config_of, load, run_folder
from ldm.metrics.features import to_uint8
from ldm.stage import judge
from ldm.task import txt2img

HERE = Path(__file__).parent


def main(run: str = str(HERE), num: int = 16, scale: float | None = None) -> None:
    """Write words.csv: for each prompt the share of draws that the judge calls the right garment, and whether the nearest caption does."""
    folder = run_folder(run)
    card, model = DataCard.read(folder), load(run)
    score, _ = judge.scorer(config_of(folder), config_of(folder).metrics)
    net = score().net
    rows = list(csv.DictReader((HERE / "prompts.csv").read_text(encoding="utf-8").splitlines()))
    wanted = [list(card.classes).index(row["label"]) for row in rows]
    told = [row["prompt"] for row in rows]
    near = nearest_caption(model.conditioner.kept.encoder, told, card.captions)
    images = txt2img(model, told, num=num, seed=3_000_000, scale=scale or 2.0)
    with torch.no_grad():
        seen = net.classify(net(to_uint8(images))).argmax(1).unflatten(0, (len(rows), num))
    for row, k, n, draws in zip(rows, wanted, near, seen, strict=True):
        row |= {"drawn": f"{(draws == k).double().mean().item():.4f}", "nearest_caption": int(n == k)}
        print(f"{row['prompt']:<36}{row['label']:<12} drawn {float(row['drawn']):6.1%}   nearest caption {'right' if n == k else card.classes[n]}")
    with open(HERE / "words.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    drawn = sum(float(row["drawn"]) for row in rows) / len(rows)
    right = sum(row["nearest_caption"] for row in rows) / len(rows)
    print(f"drawn right {drawn:.1%}   nearest caption right {right:.1%}   chance {1 / len(card.classes):.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
