"""A medium of one's own: the mean grey of an image as the length of a chain of carbon."""

from ldm.media import image
from ldm.media.files import write_sample


def write(stem, sample, metadata):
    smiles = "C" * (2 + int(4 * (1 + sample.clamp(-1, 1).mean()))) + "O"
    return write_sample(stem, {".smi": f"{smiles} {stem.name}\n".encode()}, sample, metadata)


sheet = image.sheet
