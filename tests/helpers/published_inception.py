"""Write a file with the interface of the published Inception: helpers.published_inception PATH."""

import sys

import torch


class Published(torch.nn.Module):
    """A module with the interface of the published Inception file and random weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pool, self.last = torch.nn.Linear(48, 2048), torch.nn.Linear(2048, 1008)

    def forward(
        self,
        img: torch.Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ) -> torch.Tensor:
        x = torch.nn.functional.interpolate(
            img.float() / 255, [4, 4], mode="bilinear", align_corners=False
        )
        features = torch.relu(self.pool(x.flatten(1)))
        if return_features:
            return features
        logits = (
            torch.nn.functional.linear(features, self.last.weight)
            if no_output_bias
            else self.last(features)
        )
        return logits.softmax(1)


if __name__ == "__main__":
    torch.jit.script(Published()).save(sys.argv[1])
