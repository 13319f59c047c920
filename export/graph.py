"""The merged inference graph: camera bytes in, score and anomaly map out.

Everything that can be folded exactly is folded, by the method's `merged` form (`edgead.models`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgead.models.base import AnomalyModel
from edgead.models.maps import Resize


class MergedGraph(nn.Module):
    """A method as it ships.

    Args:
        model: The trained networks, FP32. They are copied, not changed.
        dtype: Of weights and convolutions, float32 or float16.
        frame: (height, width) of the camera's frames when the graph has to resize them itself; None when
            the host hands over images of the networks' size.
    """

    def __init__(
        self,
        model: AnomalyModel,
        *,
        dtype: torch.dtype = torch.float32,
        frame: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.frame, self.input_px, self.map_cells = frame, model.input_px, model.map_cells
        self.calibration_values = len(model.raw_names) + 1
        if frame is not None:
            self.resize = Resize(frame, model.input_px)
        self.networks = model.merged(dtype)
        self._anomaly_map, self._score = model.anomaly_map, model.score
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, calibration: Tensor) -> tuple[Tensor, Tensor]:
        """Verdict numbers of a batch.

        Args:
            image: RGB frames, uint8 [N, H, W, 3]; of the networks' size, or of the size that `frame`
                names.
            calibration: float32 [k], see `edgead.calibration.graph_constants`.

        Returns:
            score float32 [N] and anomaly_map float32 [N, *map_cells].
        """
        x = image.float()  # cast first: TensorRT refuses to transpose uint8
        if self.frame is not None:
            x = torch.round(self.resize(x))  # as the pixels of an image
        maps = self._anomaly_map(self.networks(x.permute(0, 3, 1, 2)), calibration)
        return self._score(maps), maps


def flop_per_frame(graph: MergedGraph) -> int:
    """Multiplications and additions for one frame."""
    height, width = graph.frame or graph.input_px
    image = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        graph(image, torch.zeros(graph.calibration_values))
    return int(counter.get_total_flops())
