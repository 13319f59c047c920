"""The merged inference graph: camera bytes in, score and anomaly map out.

Everything that can be folded exactly is folded, by the method's `merged` form (`edgead.models`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.image import resize_matrix
from edgead.models.base import AnomalyModel


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
            for name, side, px in zip(("rows", "columns"), frame, model.input_px, strict=True):
                matrix = torch.from_numpy(resize_matrix(side, px))
                self.register_buffer(name, matrix[:, :, None, None])
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
            x = self.resize(x)
        maps = self._anomaly_map(self.networks(x.permute(0, 3, 1, 2)), calibration)
        return self._score(maps), maps

    def resize(self, frames: Tensor) -> Tensor:
        """What `edgead.image.resize` does: float32 [N, H, W, 3] to whole numbers [N, *input_px, 3].

        The two products with a matrix are convolutions, because TensorRT for RTX has no float32 products
        for Turing.
        """
        wide = F.conv2d(frames.permute(0, 2, 1, 3), self.columns)  # N, columns, H, 3
        return torch.round(F.conv2d(wide.permute(0, 2, 1, 3), self.rows))
