"""The merged inference graph: camera bytes in, score and anomaly map out.

Everything that can be folded exactly is folded (arXiv 2303.14535 defines the networks; the algebra is
in the comments): input normalisation into the first convolutions, the teacher's channel statistics into
its last convolution, and teacher-minus-student into one convolution over both networks' features, so
that the difference forms in the accumulator instead of between two rounded tensors. Teacher and student
run as the two groups of shared convolutions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.image import resize_matrix
from edgead.models.efficientad import (
    IMAGE_PX,
    IMAGENET_MEAN,
    IMAGENET_STD,
    EfficientAD,
    anomaly_map,
    anomaly_score,
    extended,
)


class MergedGraph(nn.Module):
    """EfficientAD as it ships.

    Args:
        model: The trained networks, FP32. They are copied, not changed.
        dtype: Of weights and convolutions, float32 or float16. From the squared difference on everything
            is float32, because squares overflow float16 at 256.
        frame: (height, width) of the camera's frames when the graph has to resize them itself; None when
            the host hands over 256x256 images.
        rotations: What turns teacher-minus-student and autoencoder-minus-student differences into fewer
            ones, float64 [model.targets, K] each (see `edgead.export.reduce`); None for all of them.
    """

    def __init__(
        self,
        model: EfficientAD,
        *,
        dtype: torch.dtype = torch.float32,
        frame: tuple[int, int] | None = None,
        rotations: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        teacher, student, autoencoder = model.teacher, model.student, model.autoencoder
        self.size, self.dtype, self.frame = model.size, dtype, frame
        self.border = model.border
        if frame is not None:
            for name, side in zip(("rows", "columns"), frame, strict=True):
                matrix = torch.from_numpy(resize_matrix(side, IMAGE_PX))
                self.register_buffer(name, matrix[:, :, None, None])

        # The PDNs have no padding, so (x / 255 - mean) / std folds into their first convolution as a
        # whole.
        self.conv1 = nn.Conv2d(3, 2 * teacher.conv1.out_channels, 4)
        joined = _side_by_side(teacher.conv1, student.conv1)
        scale = 1 / (255 * IMAGENET_STD.double().view(1, 3, 1, 1))
        shift = (IMAGENET_MEAN.double() / IMAGENET_STD.double()).view(1, 3, 1, 1)
        _fill(self.conv1, joined[0] * scale, joined[1] - (joined[0] * shift).sum(dim=(1, 2, 3)))
        self.conv2 = _grouped(teacher.conv2, student.conv2)
        self.conv3 = _grouped(teacher.conv3, student.conv3)
        if self.size == "m":
            self.conv4 = _grouped(teacher.conv4, student.conv4)
            self.teacher5, self.student5 = _copy(teacher.conv5), _copy(student.conv5)

        # (T(t) - mu) / sigma - S(s) is one convolution over the concatenated [t, s]. The rotations act
        # on its outputs and those of the other branch, so they fold into the same weights.
        sigma, mu = model.std.double(), model.mean.double().flatten()
        t, s, k = teacher.last, student.last, model.targets
        target = t.weight.double() / sigma.unsqueeze(1), (_bias(t) - mu) / sigma.flatten()
        if model.rotation is not None:
            target = _rotated(*target, model.rotation.double())
        difference = torch.cat([target[0], -s.weight.double()[:k]], 1), target[1] - _bias(s)[:k]
        logical, decoded = (s.weight.double()[k:], _bias(s)[k:]), _double(autoencoder.last)
        if rotations is not None:
            difference = _rotated(*difference, rotations[0])
            logical, decoded = (_rotated(*pair, rotations[1]) for pair in (logical, decoded))
        self.local = nn.Conv2d(t.in_channels + s.in_channels, len(difference[1]), t.kernel_size)
        _fill(self.local, *difference)
        self.logical = nn.Conv2d(s.in_channels, len(logical[1]), s.kernel_size)
        _fill(self.logical, *logical)

        # The autoencoder pads with zeros *after* normalisation: the mean is subtracted first, and
        # 1 / (255 std) folds into the weights.
        self.autoencoder = type(autoencoder)(autoencoder.cells, model.targets)
        self.autoencoder.load_state_dict(autoencoder.state_dict())
        self.autoencoder.dropout = nn.Identity()
        last = autoencoder.last
        self.autoencoder.last = nn.Conv2d(last.in_channels, len(decoded[1]), 3, 1, 1)
        _fill(self.autoencoder.last, *decoded)
        first = autoencoder.encoder[0]
        _fill(self.autoencoder.encoder[0], first.weight.double() * scale, _bias(first))
        self.register_buffer("mean255", 255 * IMAGENET_MEAN)
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.to(dtype)

    def forward(self, image: Tensor, calibration: Tensor) -> tuple[Tensor, Tensor]:
        """Verdict numbers of a batch.

        Args:
            image: RGB frames, uint8 [N, H, W, 3]; 256x256, or of the size that `frame` names.
            calibration: float32 [3], see `edgead.training.calibrate.graph_constants`.

        Returns:
            score float32 [N] and anomaly_map float32 [N, 64, 64].
        """
        x = image.float()  # cast first: TensorRT refuses to transpose uint8
        if self.frame is not None:
            x = self.resize(x)
        local, logical = self._differences(x.permute(0, 3, 1, 2))
        maps = anomaly_map(local.square().mean(1), logical.square().mean(1), calibration)
        return anomaly_score(maps), maps

    def resize(self, frames: Tensor) -> Tensor:
        """What `edgead.image.resize` does: float32 [N, H, W, 3] to whole numbers [N, 256, 256, 3].

        The two products with a matrix are convolutions, because TensorRT for RTX has no float32 products
        for Turing.
        """
        wide = F.conv2d(frames.permute(0, 2, 1, 3), self.columns)  # N, 256 columns, H, 3
        return torch.round(F.conv2d(wide.permute(0, 2, 1, 3), self.rows))

    def _differences(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher minus student and autoencoder minus student, float32 [N, K, cells, cells].

        Args:
            x: RGB 0..255, float [N, 3, 256, 256].
        """
        both = F.avg_pool2d(torch.relu(self.conv1(extended(x.to(self.dtype), self.border))), 2, 2)
        both = F.avg_pool2d(torch.relu(self.conv2(both)), 2, 2)
        both = torch.relu(self.conv3(both))
        if self.size == "m":
            t, s = torch.relu(self.conv4(both)).chunk(2, 1)
            student = torch.relu(self.student5(s))
            both = torch.cat([torch.relu(self.teacher5(t)), student], 1)
        else:
            student = both[:, both.shape[1] // 2 :]
        decoded = self.autoencoder((x - self.mean255).to(self.dtype))
        return self.local(both).float(), decoded.float() - self.logical(student).float()


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias.double()


def _fill(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Set parameters that were computed in float64."""
    assert conv.bias is not None and conv.weight.shape == weight.shape
    conv.weight.data.copy_(weight)
    conv.bias.data.copy_(bias)


def _double(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    return conv.weight.double(), _bias(conv)


def _rotated(weight: Tensor, bias: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters of a convolution whose C outputs are multiplied with a matrix [C, K]; float64."""
    return torch.einsum("cikl,cr->rikl", weight, rotation), rotation.T @ bias


def _side_by_side(a: nn.Conv2d, b: nn.Conv2d) -> tuple[Tensor, Tensor]:
    return torch.cat([a.weight, b.weight]).double(), torch.cat([_bias(a), _bias(b)])


def _grouped(a: nn.Conv2d, b: nn.Conv2d) -> nn.Conv2d:
    """Two equal convolutions as the two groups of one."""
    conv = nn.Conv2d(2 * a.in_channels, 2 * a.out_channels, a.kernel_size, groups=2)
    _fill(conv, *_side_by_side(a, b))
    return conv


def _copy(a: nn.Conv2d) -> nn.Conv2d:
    conv = nn.Conv2d(a.in_channels, a.out_channels, a.kernel_size)
    _fill(conv, a.weight.double(), _bias(a))
    return conv
