"""What start-up is measured against: a training script as one writes it first, its libraries imported at the top, data
cached.
"""

import lightning as L
import open_clip  # noqa: F401  as every such script imports its text encoder
import torch
import torchmetrics
from diffusers import UNet2DConditionModel
from torch.utils.data import DataLoader, TensorDataset


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        blocks = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        sizes = {
            "block_out_channels": (48, 96),
            "layers_per_block": 2,
            "cross_attention_dim": 96,
            "attention_head_dim": 4,
        }
        self.net = UNet2DConditionModel(
            sample_size=8, in_channels=8, out_channels=8, norm_num_groups=16, **sizes, **blocks
        )
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        z, context = batch
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(z),))
        loss = (self.net(z + noise, t, context).sample - noise).square().mean()
        self.mean(loss.detach())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


if __name__ == "__main__":
    data = TensorDataset(torch.randn(2560, 8, 8, 8), torch.randn(2560, 16, 96))
    L.Trainer(max_steps=1, accelerator="cpu", logger=False).fit(Model(), DataLoader(data, 128, shuffle=True))
