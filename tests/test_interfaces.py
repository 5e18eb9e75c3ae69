"""The interfaces of parts: ldm's own classes have them, and what is optional is what code asks for."""

import re

import pytest
import torch
from smoke import ROOT
from torch import nn

from ldm import interfaces
from ldm.autoencoder.conv import Decoder, Encoder
from ldm.autoencoder.patch import PatchDecoder, PatchEncoder
from ldm.conditioner.compose import Compose
from ldm.conditioner.label import Label
from ldm.conditioner.none import Unconditional
from ldm.data.bucket import BucketedDataset
from ldm.data.memory import InMemoryDataset
from ldm.data.synthetic import Synthetic
from ldm.diffusion import schedule
from ldm.diffusion.objective import LogVariance, Objective
from ldm.interfaces import missing_members, required_members
from ldm.net.dit import DiT
from ldm.net.unet import UNet

SOURCE = "\n".join(file.read_text() for file in sorted((ROOT / "ldm").rglob("*.py")) if file.name != "interfaces.py")
OPTIONAL = [protocol for name, protocol in sorted(vars(interfaces).items()) if name.startswith("Optional")]


@pytest.mark.parametrize(
    ("part", "protocol"),
    [
        (UNet, interfaces.Network),
        (DiT, interfaces.Network),
        (Encoder, interfaces.Encoder),
        (PatchEncoder, interfaces.Encoder),
        (Decoder, interfaces.Decoder),
        (PatchDecoder, interfaces.Decoder),
        (Label(2), interfaces.Conditioner),
        (Unconditional(), interfaces.Conditioner),
        (Compose(label=Label(2)), interfaces.Conditioner),
        (Objective, interfaces.Objective),
        (LogVariance, interfaces.Objective),
        (Synthetic(num=2), interfaces.Dataset),
        (schedule.Flow(), schedule.Schedule),
        (schedule.cosine(), schedule.Schedule),
    ],
)
def test_part_has_the_members_of_its_interface(part, protocol):
    assert missing_members(part, protocol) == []
    assert missing_members(nn.Identity(), protocol) == [n for n in required_members(protocol) if n != "forward"]


def test_bucketed_dataset_has_the_members_of_a_dataset():
    part = InMemoryDataset("a", torch.zeros(1, 1, 4, 8, dtype=torch.uint8), torch.zeros(1), {"a": ["a"]})
    data = BucketedDataset(Synthetic(num=1, size=8), [part], [0])
    assert missing_members(data, interfaces.Dataset) == []


@pytest.mark.parametrize("protocol", OPTIONAL, ids=lambda protocol: protocol.__name__)
def test_optional_member_is_one_that_code_asks_for(protocol):
    reads = {name for name in required_members(protocol) if not re.search(rf'attr\(.+, "{name}"', SOURCE)}
    reads -= {name for name in reads if re.search(rf"(\w|\))\.{name}\b", SOURCE)}
    assert required_members(protocol)
    assert not reads
