"""Molecules: one-hot strings of symbols (symbols, L), as a SMILES in an .smi file and a drawing of the structure."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.io.images import make_grid
from ldm.io.molecules import RejectedMoleculeError, quiet_rdkit, read_molecule, samples_to_smiles, vocabulary_of
from ldm.media.files import write_sample

IS_PICTURE = False
SIDE = 200  # pixels of a drawing


def write(stem: Path, sample: Tensor, metadata: Mapping[str, str]) -> list[Path]:
    """Write a sample (symbols, L) as STEM.smi, its SMILES in a line, and STEM.png, a drawing with the metadata in it.

    The SMILES of a sample that is no molecule is written as it was drawn, and the picture says so.
    """
    (smiles,) = samples_to_smiles(sample[None])
    return write_sample(stem, {".smi": f"{smiles}\n".encode()}, draw(smiles).float() / 127.5 - 1, metadata)


def sheet(samples: Sequence[Tensor], columns: int) -> Tensor:
    """Draw the structures of samples (symbols, L) and arrange them in rows; return (3, H, W) in [-1, 1]."""
    drawings = torch.stack([draw(smiles) for smiles in samples_to_smiles(torch.stack(list(samples)))])
    return make_grid(drawings, columns).float() / 127.5 - 1


def fault(shape: Sequence[int]) -> str:
    """Return why samples of a shape are no molecules, "" if they are."""
    try:
        vocabulary_of(torch.empty(shape, device="meta"))
    except UserError as error:
        return str(error)
    return ""


def draw(smiles: str, side: int = SIDE) -> Tensor:
    """Draw the structure of a molecule, or write that a text is none: (3, side, side) uint8."""
    from PIL import Image, ImageDraw

    with quiet_rdkit():
        from rdkit.Chem.Draw import rdMolDraw2D

        try:
            canvas = rdMolDraw2D.MolDraw2DCairo(side, side)
            rdMolDraw2D.PrepareAndDrawMolecule(canvas, read_molecule(smiles))
            canvas.FinishDrawing()
            picture = Image.open(BytesIO(canvas.GetDrawingText())).convert("RGB")
        except RejectedMoleculeError:
            picture = Image.new("RGB", (side, side), "white")
            ImageDraw.Draw(picture).text((side / 2, side / 2), "no molecule", "black", anchor="mm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
