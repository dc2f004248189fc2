"""Layers that compute what PyTorch's compute, faster or in a safer precision."""

import torch
from torch import nn


class FullPrecision(nn.Module):
    """Ends a network: whatever autocast does inside, what comes out has at least float32."""

    def forward(self, x):
        """x [...], in float32 if it was rounded below that."""
        return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def with_parameters_of(layer, kind):
    """A layer of class `kind` with the parameters of the convolution `layer`."""
    size = layer.in_channels, layer.out_channels, layer.kernel_size
    own = nn.utils.skip_init(kind, *size, stride=layer.stride)  # draws no random numbers
    own.weight, own.bias = layer.weight, layer.bias
    return own


def as_autocast_would(*tensors):
    """Tensors of a CPU in the precision of autocast, as they are without it."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors)


class Convolution(nn.Conv2d):
    """A convolution of stride 2 without padding, for outputs of few pixels; faster on a CPU."""

    def forward(self, x):
        """[n, I, h, h] -> [n, O, (h - k) // 2 + 1, same], as in PyTorch."""
        if x.device.type != "cpu":
            return super().forward(x)
        return ConvolutionToFewPixels.apply(*as_autocast_would(x, self.weight, self.bias))


class ConvolutionToFewPixels(torch.autograd.Function):
    """A convolution of stride 2 whose weights get their gradient from one matrix product.

    That of the encoder's last takes oneDNN five times as long. With more pixels there are too
    many patches to copy.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        """x [n, I, h, h], weight [O, I, k, k] -> [n, O, (h - k) // 2 + 1, same]."""
        ctx.save_for_backward(x, weight)
        return nn.functional.conv2d(x, weight, bias, stride=2)

    @staticmethod
    def backward(ctx, gradient):
        """Gradients of x, weight and bias from that of the output."""
        x, weight = ctx.saved_tensors
        outputs, inputs, k, _ = weight.shape
        plain = None, (2, 2), (0, 0), (1, 1), False, (0, 0), 1, (True, False, False)
        to_x, _, _ = torch.ops.aten.convolution_backward(gradient, x, weight, *plain)
        patches = x.permute(0, 2, 3, 1).unfold(1, k, 2).unfold(2, k, 2)  # [n, h', h', I, k, k]
        patches = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, k * k * inputs)
        to_weight = gradient.permute(0, 2, 3, 1).reshape(-1, outputs).T @ patches
        to_weight = to_weight.view(outputs, k, k, inputs).permute(0, 3, 1, 2)
        return to_x, to_weight, gradient.sum((0, 2, 3))


class Deconvolution(nn.ConvTranspose2d):
    """A transposed convolution of stride 2 without padding, faster on a CPU.

    A 1 x 1 input is a matrix product, a larger one goes through `SubPixelConvolution`.
    """

    def forward(self, x):
        """[n, I, h, h] -> [n, O, 2 (h - 1) + k, same], as in PyTorch."""
        if x.device.type != "cpu":
            return super().forward(x)
        x, weight, bias = as_autocast_would(x, self.weight, self.bias)
        if x.shape[-1] > 1:
            return SubPixelConvolution.apply(x, weight, bias)
        height, width = weight.shape[2:]
        image = x.flatten(1) @ weight.permute(0, 2, 3, 1).flatten(1)
        return image.unflatten(1, (height, width, -1)).permute(0, 3, 1, 2) + bias[:, None, None]


class SubPixelConvolution(torch.autograd.Function):
    """A transposed convolution of stride 2 as a plain one with four times the channels.

    They are its four output phases (even and odd rows and columns). oneDNN's own transposed
    convolution takes up to four times as long. Its backward is fine, but for the bias, whose
    gradient is summed apart.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        """x [n, I, h, h] in channels_last, weight [I, O, k, k] -> [n, O, 2 (h - 1) + k, same]."""
        ctx.save_for_backward(x, weight)
        n, inputs, h, _ = x.shape
        _, outputs, k, _ = weight.shape
        half = (k + 1) // 2
        # out[2 i + p] sums weight[2 j + p] x[i - j]: phase p convolves with every second weight.
        phases = nn.functional.pad(weight, (0, k % 2, 0, k % 2))
        phases = phases.reshape(inputs, outputs, half, 2, half, 2).flip(2, 4)
        phases = phases.permute(3, 5, 1, 0, 2, 4).reshape(4 * outputs, inputs, half, half)
        phases = phases.contiguous(memory_format=torch.channels_last)
        image = nn.functional.conv2d(x, phases, bias.repeat(4), padding=half - 1)
        size = image.shape[-1]
        image = image.permute(0, 2, 3, 1).reshape(n, size, size, 2, 2, outputs).transpose(2, 3)
        image = image.reshape(n, 2 * size, 2 * size, outputs)
        size = 2 * (h - 1) + k
        return image[:, :size, :size].contiguous().permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient):
        """Gradients of x, weight and bias from that of the output."""
        x, weight = ctx.saved_tensors
        transposed = None, (2, 2), (0, 0), (1, 1), True, (0, 0), 1, (True, True, False)
        to_x, to_weight, _ = torch.ops.aten.convolution_backward(gradient, x, weight, *transposed)
        return to_x, to_weight, gradient.sum((0, 2, 3))


class GRUCell(nn.GRUCell):
    """PyTorch's GRU cell; compiled for a GPU, it is written out.

    There PyTorch's own is one kernel, into which a compiler cannot look: it may not compile, and
    nothing is fused with it.
    """

    @classmethod
    def like(cls, cell):
        """A cell with the parameters of `cell`, an `nn.GRUCell`."""
        own = nn.utils.skip_init(cls, cell.input_size, cell.hidden_size)  # draws no random numbers
        for name, parameter in cell.named_parameters():
            setattr(own, name, parameter)
        return own

    def forward(self, x, belief):
        """[n, I], [n, D] -> the next belief [n, D], as in PyTorch."""
        if torch.compiler.is_compiling() and x.device.type == "cuda":
            return self.written_out(x, belief)
        return super().forward(x, belief)

    def written_out(self, x, belief):
        """The same with plain operations."""
        from_x = nn.functional.linear(x, self.weight_ih, self.bias_ih).chunk(3, -1)
        from_belief = nn.functional.linear(belief, self.weight_hh, self.bias_hh).chunk(3, -1)
        reset = torch.sigmoid(from_x[0] + from_belief[0])
        update = torch.sigmoid(from_x[1] + from_belief[1])
        candidate = torch.tanh(from_x[2] + reset * from_belief[2])
        return candidate + update * (belief - candidate)
