"""Records what transformers' BertModel and tokenizer make of the asset's files: python tests/tools/record_minilm.py

Not a test and not needed by one: minilm.json, which it writes into tests/conditioner, is committed. Needs transformers,
which the project does not.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from ldm.io.download import minilm

TEXTS = [
    "",
    "a photo of an ankle boot",
    "naïve café, it's 50% (off)!",
    "日本 😀 zxqv",
    "a loose short-sleeved cotton T-shirt with a round neck and a very small unreadable logo",
]

if __name__ == "__main__":
    folder = minilm()
    bert = BertModel(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    ).eval()
    state = load_file(folder / "model.safetensors")
    bert.load_state_dict({name: value for name, value in state.items() if not name.endswith("position_ids")})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]", model_max_length=512
    )
    batch = tokenizer(TEXTS, padding="longest", truncation=False, return_tensors="pt")
    with torch.no_grad():
        hidden = bert(
            batch["input_ids"], batch["attention_mask"], torch.zeros_like(batch["input_ids"])
        ).last_hidden_state
    mask = batch["attention_mask"].bool()
    mean = torch.stack([row[keep].mean(0) for row, keep in zip(hidden, mask, strict=True)])
    rows = [
        {
            "text": text,
            "ids": ids[keep].tolist(),
            "hidden": row[keep][:, ::64].tolist(),  # six of 384 numbers for each token
            "norm": row[keep].norm(dim=1).tolist(),  # and all of them together
            "mean": vector[::16].tolist(),
        }
        for text, ids, row, keep, vector in zip(TEXTS, batch["input_ids"], hidden, mask, mean, strict=True)
    ]
    text = json.dumps(json.loads(json.dumps(rows), parse_float=lambda x: round(float(x), 7)), ensure_ascii=False)
    (Path(__file__).parents[1] / "conditioner" / "minilm.json").write_text(
        text.replace('{"text"', '\n{"text"') + "\n", encoding="utf-8"
    )
