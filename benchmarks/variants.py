"""What throughput.py compares: the variants of an update, and the sizes of its batch.

Nothing heavy is imported here: a process that only starts others, or prints, stays small.
"""

from dataclasses import dataclass, replace

PHASES = (
    "dynamics forward",
    "dynamics backward",
    "behavior forward",
    "behavior backward",
    "optimizer",
)
GFLOP = 880  # of one update from pixels: 50 x 50 frames, 2500 dreams of 15 steps, nothing wasted
TUNED = ("process",)  # every switch that our own runs set


@dataclass(frozen=True)
class Variant:
    """One way to make an update.

    Attributes:
        way: `ours`, or `torchrl`: TorchRL's parts, which the tables call the library.
        precision: of the networks.
        switches: names in `switches.SWITCHES`, process-wide settings that are the same code for
            both ways.
        overrides: of the configuration (ours).
        without: a name in `switches.WITHOUT`: undoes one thing that makes an update fast (ours).
        compiled: the losses that go through torch.compile (TorchRL's parts).
        quick: measured with --quick too.
        peer: TorchRL's parts with the same precision and switches.
    """

    way: str
    precision: str
    switches: tuple = ()
    overrides: tuple = ()
    without: str = ""
    compiled: tuple = ()
    quick: bool = False
    peer: str = ""


@dataclass(frozen=True)
class Size:
    """The batch of an update; `quick`: measured with --quick too."""

    observation: str  # pixels | states
    sequences: int
    length: int
    quick: bool

    @property
    def frames(self):
        """Rows of the batch."""
        return self.sequences * self.length


EAGER = ("optimization.compile=false",)  # auto would compile on a GPU
COMPILED = ("optimization.compile=true",)
GRAPHS = ("optimization.compile=reduce-overhead",)
BASELINE = "library, float32"  # ratios are against this one, and against the peer
UPDATES = {
    "library, float32": Variant("torchrl", "float32", quick=True),
    "library, bfloat16": Variant("torchrl", "bfloat16"),
    "library, float32, tuned": Variant("torchrl", "float32", TUNED, quick=True),
    "library, bfloat16, tuned": Variant("torchrl", "bfloat16", TUNED, quick=True),
    "library, bfloat16, tuned, compiled": Variant(
        "torchrl", "bfloat16", TUNED, compiled=("actor", "value")
    ),
    "ours, float32, untuned": Variant("ours", "float32", (), EAGER, peer="library, float32"),
    "ours, float32": Variant(
        "ours", "float32", TUNED, EAGER, quick=True, peer="library, float32, tuned"
    ),
    "ours, float32, compiled": Variant(
        "ours", "float32", TUNED, COMPILED, peer="library, float32, tuned"
    ),
    "ours, bfloat16": Variant(
        "ours", "bfloat16", TUNED, EAGER, quick=True, peer="library, bfloat16, tuned"
    ),
    "ours, bfloat16, compiled": Variant(
        "ours", "bfloat16", TUNED, COMPILED, peer="library, bfloat16, tuned"
    ),
}
CUDA_BASELINE = "TorchRL's parts, float32"
CUDA_PEER = "TorchRL's parts, bfloat16, tuned"
CUDA_UPDATES = {  # those of `throughput.py --cuda`
    CUDA_BASELINE: Variant("torchrl", "float32"),
    "TorchRL's parts, float32, tuned": Variant("torchrl", "float32", TUNED),
    CUDA_PEER: Variant("torchrl", "bfloat16", TUNED),
    f"{CUDA_PEER}, compiled": Variant("torchrl", "bfloat16", TUNED, compiled=("actor", "value")),
    "ours, float32, eager": Variant(
        "ours", "float32", TUNED, EAGER, peer="TorchRL's parts, float32, tuned"
    ),
    "ours, bfloat16, eager": Variant("ours", "bfloat16", TUNED, EAGER, peer=CUDA_PEER),
    "ours, bfloat16, compiled": Variant("ours", "bfloat16", TUNED, COMPILED, peer=CUDA_PEER),
    "ours, bfloat16, CUDA graphs": Variant("ours", "bfloat16", TUNED, GRAPHS, peer=CUDA_PEER),
}
SIZES = {
    "states, 8 x 16": Size("states", 8, 16, quick=True),
    "states, 50 x 50": Size("states", 50, 50, quick=False),
    "pixels, 8 x 16": Size("pixels", 8, 16, quick=True),
    "pixels, 50 x 50": Size("pixels", 50, 50, quick=False),
}
PAPER_SIZE = "pixels, 50 x 50"

BEST = Variant("ours", "bfloat16", TUNED)
ABLATIONS = {  # one thing switched off
    "everything": BEST,
    "bfloat16": replace(BEST, precision="float32"),
    "kept memory": replace(BEST, switches=("matmul",)),
    "oneDNN float32": replace(BEST, switches=("allocator",)),
    "gradients of the wanted parameters only": replace(BEST, without="own gradients only"),
    "channels_last": replace(BEST, without="channels_last"),
    "own deconvolutions": replace(BEST, without="own deconvolutions"),
    "own last convolution": replace(BEST, without="own last convolution"),
    "ELU in place": replace(BEST, without="ELU in place"),
    "one value forward for both losses": replace(BEST, without="one value forward"),
    "fused Adam": replace(BEST, without="fused Adam"),
}
