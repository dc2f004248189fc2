"""What a variant of an update switches on in its process, or off in our code."""

import ctypes

import torch
from torch import nn

import dreamer_utils as utils
from common.device import route_float32_products
from common.layers import Deconvolution, with_parameters_of


# --- Process-wide settings, the same for both ways -----------------------------------------------
def keep_big_blocks(device):
    """Keeps freed blocks of any size, which spares the page faults of fresh ones (glibc only)."""
    trim_threshold, mmap_max = -1, -4  # their numbers in malloc.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def fast_matmul(device):
    """float32 matmuls through the fastest library on a CPU, in TF32 on a GPU."""
    if device.type == "cpu":
        route_float32_products()
    else:
        torch.set_float32_matmul_precision("high")


SWITCHES = {"process": utils.tune_process, "allocator": keep_big_blocks, "matmul": fast_matmul}


# --- Our update with one thing undone ------------------------------------------------------------
def everything_differentiated(agent, optimizers):
    """Every loss is differentiated for all parameters that it depends on."""
    parameters = list(agent.parameters())
    for optimizer in optimizers.values():

        def backward(loss, retain_graph=False, self=optimizer):
            gradients = torch.autograd.grad(
                self.scaler.scale(loss), parameters, retain_graph=retain_graph, allow_unused=True
            )
            own = {id(parameter) for parameter in self.parameters}
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if id(parameter) in own:
                    parameter.grad = gradient

        optimizer.backward = backward


def plain_layout(agent, optimizers):
    """Images and kernels with the channels first."""
    agent.to(memory_format=torch.contiguous_format)
    preprocess = agent.world_model.preprocess
    agent.world_model.preprocess = lambda observation: preprocess(observation).contiguous()


def plain_deconvolutions(agent, optimizers):
    """PyTorch's transposed convolutions, with the same parameters."""
    layers = agent.world_model.decoder.decoder
    for index, layer in enumerate(layers):
        if isinstance(layer, Deconvolution):
            layers[index] = with_parameters_of(layer, nn.ConvTranspose2d)


def plain_convolutions(agent, optimizers):
    """PyTorch's convolution at the end of the encoder, with the same parameters."""
    layers = agent.world_model.encoder.encoder
    layers[-2] = with_parameters_of(layers[-2], nn.Conv2d)


def kept_elu_inputs(agent, optimizers):
    """ELUs keep what they compute from."""
    for module in agent.modules():
        if isinstance(module, nn.ELU):
            module.inplace = False


def two_value_forwards(agent, optimizers):
    """As if the losses of actor and critic each computed the values."""
    once = agent.value.forward

    def forward(*inputs):
        once(*inputs)
        return once(*inputs)

    agent.value.forward = forward


def plain_adam(agent, optimizers):
    """Adam that is not fused."""
    for optimizer in optimizers.values():
        for group in optimizer.adam.param_groups:
            group["fused"] = False


WITHOUT = {
    "own gradients only": everything_differentiated,
    "channels_last": plain_layout,
    "own deconvolutions": plain_deconvolutions,
    "own last convolution": plain_convolutions,
    "ELU in place": kept_elu_inputs,
    "one value forward": two_value_forwards,
    "fused Adam": plain_adam,
}
