"""One token for each of many replies, on a GPU: a fixed list of launches over buffers that never move, so that it can
be recorded once for a number of rows and replayed without Python.

    inputs     what a step needs to know, in one buffer that goes to the device in one copy
    slots      what stays on the device as long as a reply is written: its frequencies, which tokens it has seen
    plain      the step's operations by torch: the definition, and what runs without Triton
    fused      ... by the kernels of ops/triton
    obstacles  ... whether they run here
    graphs     recording and replaying
    program    the step itself
    decoder    launches it, and tells the tokens when they are there

A step is launched before the tokens of the one before are known on the host: its ids are taken from there on the
device.
The modules of model.py are the definition of the whole (tests/decode/test_program.py).

Left out: prompts, which run by the modules; adapters, grammars and guesses, which the engine runs by the modules too.
"""

from qwenlet.decode.decoder import Decoder, Launch, Row
from qwenlet.decode.obstacles import obstacle, unfit

__all__ = ["Decoder", "Launch", "Row", "obstacle", "unfit"]
