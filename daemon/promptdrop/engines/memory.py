"""Keep the model's weights on the device, or on the host and stream them from there.

A component is streamed block by block: its blocks' matrices stay in pinned host memory and arrive on
the device one after another, the next block's while one block runs. Everything else stays on the device,
except for the text encoder's table of embeddings: a prompt needs a few of its rows, which are looked up
on the host. Without compiling, the pixels are the same to the bit.

diffusers.hooks.apply_group_offloading (0.42.1) is similar and is not used: it pins a
copy of all blocks before it frees the first, each tensor rounded up to a power of two by torch
(17.3 GiB beside the 11.5 that the transformer was loaded into); it sends what is no block, that table of
742 MiB too, there and back with every call; and it replaces `forward`, as `forward.together` does.
"""

import mmap
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from promptdrop import log
from promptdrop.config import Config, width_height

MIB = 1024 * 1024
GIB = 1024 * MIB
ALIGNMENT = 512  # bytes, as torch's own allocations have it: kernels are chosen by it

# The components that each mode streams, from the fastest to the one that needs least device memory.
OFFLOADS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "text_encoder": ("text_encoder",),
    "model": ("text_encoder", "transformer"),
}
COMPONENTS = ("vae", "text_encoder", "transformer")

# What rendering needs beside the weights, per 1024x1024 pixels of the largest size of warm-up.
WORKING_BYTES = int(2.4 * GIB)  # measured on an H200, bf16: the peak was 21.7 GiB, weights 19.3
# For each further image of a batch: an estimate; the decoder takes one at a time.
FURTHER_BYTES = GIB
OTHER_BYTES = GIB // 2  # code and workspaces of CUDA's libraries, and gaps; an estimate


@dataclass(frozen=True, slots=True)
class Footprint:
    """The bytes that a component takes on the device."""

    whole: int
    streamed: int  # two blocks, and everything that is in no block


def footprint(component: nn.Module) -> Footprint:
    """Measure a component, wherever it is now."""
    whole = sum(tensor.nbytes for tensor in tensors(component))
    moving = [*blocks(component), *tables(component)]
    moved = sum(tensor.nbytes for part in moving for tensor in matrices(part))
    return Footprint(whole, whole - moved + 2 * max(map(space, blocks(component)), default=0))


def needs(footprints: Mapping[str, Footprint], working: int) -> dict[str, int]:
    """Return the bytes needed on the device for each of OFFLOADS. footprints: by component."""
    return {
        offload: working
        + sum(
            each.streamed if name in streamed else each.whole for name, each in footprints.items()
        )
        for offload, streamed in OFFLOADS.items()
    }


def working_bytes(config: Config) -> int:
    """Estimate the bytes that rendering the largest size of warm-up needs beside the weights."""
    sides = map(width_height, config.engine.warmup)
    pixels = max((width * height for width, height in sides), default=1024 * 1024)
    per_megapixel = WORKING_BYTES + (config.engine.batch - 1) * FURTHER_BYTES
    return per_megapixel * pixels // (1024 * 1024) + OTHER_BYTES


def plan(free: int, need: Mapping[str, int]) -> str:
    """Choose the fastest offload that fits into so many bytes; if none does, the one that needs least."""
    return next((offload for offload, size in need.items() if size <= free), [*need][-1])


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a CUDA device that this process can have, including those it has already."""
    free, total = torch.cuda.mem_get_info(device)
    fraction_of = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # not in every torch
    limit = int(total * fraction_of(device)) if fraction_of else total
    return min(free + torch.cuda.memory_reserved(device), limit)


def choose(config: Config, pipe: Any, device: torch.device) -> tuple[str, str]:
    """Resolve `engine.offload: auto`, and log it.

    Returns the offload, and in words what it needs and what is free.
    """
    wanted = config.engine.offload
    if device.type != "cuda":
        why = "there is no device but the CPU"
        log.get().info("engine.offload", offload="none", wanted=wanted, reason=why)
        return "none", why
    footprints = {name: footprint(getattr(pipe, name)) for name in COMPONENTS}
    need, free = needs(footprints, working_bytes(config)), free_bytes(device)
    offload = plan(free, need) if wanted == "auto" else wanted
    log.get().info(
        "engine.offload",
        offload=offload,
        wanted=wanted,
        fits=need[offload] <= free,
        free_mib=free // MIB,
        need_mib={name: size // MIB for name, size in need.items()},
    )
    return offload, (
        f" (engine.offload: {offload} needs {need[offload] // MIB} MiB, free are {free // MIB} MiB)"
    )


def place(pipe: Any, offload: str, device: torch.device) -> None:
    """Move each component to where an offload keeps it; never more to the device than stays there.

    Raises RuntimeError: the device has too little memory. OSError: the host has too little.
    """
    for name in COMPONENTS:
        component = getattr(pipe, name)
        if name in OFFLOADS[offload]:
            stream(component, device)
        else:
            component.to(device)


def stream(component: nn.Module, device: torch.device) -> None:
    """Have a component's blocks streamed through the device from now on. This cannot be undone.

    Interrupted, as by an image's timeout, it leaves a component that works; the rest of it is moved when
    it is next used.

    Raises OSError: the host has too little memory, or will not pin it.
    """
    for table in tables(component):
        look_up_on_host(table, device)
    Streamed(blocks(component), device).leave()
    elsewhere = {id(t) for part in (*blocks(component), *tables(component)) for t in matrices(part)}
    for tensor in tensors(component):
        if id(tensor) not in elsewhere:
            tensor.data = tensor.data.to(device)


def blocks(component: nn.Module) -> list[nn.Module]:
    """List the blocks of a component, which are streamed, in the order in which they run."""
    lists = [child for child in component.children() if isinstance(child, nn.ModuleList)]
    return [block for each in lists for block in each]


def tables(component: nn.Module) -> list[nn.Embedding]:
    """List the embeddings of a component, which are looked up on the host."""
    return [child for child in component.children() if isinstance(child, nn.Embedding)]


def look_up_on_host(table: nn.Embedding, device: torch.device) -> None:
    """Keep a table on the host: token ids are brought there, and its rows to the device."""
    weight = table.weight
    table.register_forward_pre_hook(lambda _, inputs: tuple(x.to(weight.device) for x in inputs))
    table.register_forward_hook(lambda _, inputs, rows: rows.to(device, non_blocking=True))
    weight.data = weight.data.cpu()


class Streamed:
    """Brings the weights of blocks to the device before they run. All blocks run on one CUDA stream.

    Two slots on the device hold the weights of two blocks: the one that runs, and the next. Blocks that
    run in another order get the right weights, too, but wait for them.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """`leave` moves their weights to the host; it is called at the latest when a block runs."""
        self._blocks = blocks
        self._device = device
        self._kept: list[Tensor] = []  # a block's weights each, uint8 [bytes]
        self._slots: Tensor | None = None  # uint8 [2, bytes of the largest block]
        self._held: list[int | None] = [None, None]  # which block's weights are in each slot
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
            self._arrived = [torch.cuda.Event(), torch.cuda.Event()]  # type: ignore[no-untyped-call]  # torch's
            unpin = weakref.finalize(self, unpinned, self._kept)
            unpin.atexit = False  # when the process ends, the driver unpins
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before, index))

    def leave(self) -> None:
        """Move the weights to the host. Raises OSError: it has too little memory, or will not pin it."""
        for block in self._blocks[len(self._kept) :]:
            self._kept.append(to_host(block, self._device))

    def _before(self, index: int, block: nn.Module, inputs: Any) -> None:
        """Called before a block runs: wait for its weights, and send for those of the next block."""
        slots = self._slots if self._slots is not None else self._make_slots()
        if self._held[index % 2] != index:
            self._fetch(index, slots)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_event(self._arrived[index % 2])
        following = (index + 1) % len(self._blocks)
        if following % 2 != index % 2 and self._held[following % 2] != following:
            self._fetch(following, slots)

    def _make_slots(self) -> Tensor:
        """Make the slots at the first use, where running out of memory is handled as in any image."""
        self.leave()
        slots = torch.empty(2, max(map(len, self._kept)), dtype=torch.uint8, device=self._device)
        for index, block in enumerate(self._blocks):
            inside = matrices(block)
            for tensor, view in zip(inside, views(slots[index % 2], inside), strict=True):
                tensor.data = view
        self._held = [None, None]
        self._slots = slots
        return slots

    def _fetch(self, index: int, slots: Tensor) -> None:
        """Queue the copy of a block's weights into its slot, behind work that may still read the slot."""
        kept, slot = self._kept[index], index % 2
        self._held[slot] = None  # if we are interrupted here, it is fetched again
        if self._device.type == "cuda":
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._copies):
                slots[slot, : len(kept)].copy_(kept, non_blocking=True)
                self._arrived[slot].record()
        else:
            slots[slot, : len(kept)].copy_(kept)
        self._held[slot] = index


def tensors(module: nn.Module) -> list[Tensor]:
    """List the parameters and buffers of a module, each once."""
    return [*{id(t): t for t in (*module.parameters(), *module.buffers())}.values()]


def matrices(module: nn.Module) -> list[Tensor]:
    """List the tensors of a block that are streamed: its matrices.

    Norms and biases, a few KiB, stay on the device: FastForward uses a block's last norm when the next
    block has begun.
    """
    return [tensor for tensor in tensors(module) if tensor.ndim > 1]


def space(module: nn.Module) -> int:
    """Count the bytes that a module's matrices take one behind the other, aligned."""
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in matrices(module))


def views(memory: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield views of `memory`, uint8 [bytes], with the shapes, strides and dtypes of these tensors."""
    begin = 0
    for tensor in like:
        strides = torch.empty_like(tensor, device="meta").stride()  # without gaps
        part = memory[begin : begin + tensor.nbytes].view(tensor.dtype)
        yield part.as_strided(tensor.shape, strides)
        begin += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def to_host(block: nn.Module, device: torch.device) -> Tensor:
    """Move a block's weights into one piece of pinned host memory: uint8 [bytes].

    If it was interrupted, it can be called again.

    Raises OSError: the host has too little memory, or will not pin it.
    """
    memory = torch.frombuffer(
        mmap.mmap(-1, space(block), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8
    )  # not torch's own pinned memory: that is rounded up to a power of two
    inside = matrices(block)
    for tensor, view in zip(inside, views(memory, inside), strict=True):
        view.copy_(tensor.data)
        tensor.data = view
    if device.type == "cuda":
        cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
        error = cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(error) != 0:
            raise OSError(f"{memory.nbytes // MIB} MiB of host memory cannot be pinned: {error}")
    return memory


def unpinned(pinned: Sequence[Tensor]) -> None:
    """Unpin memory before it is given back, once nothing on the device reads it any more."""
    torch.cuda.synchronize()
    cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
    for memory in pinned:
        cuda.cudaHostUnregister(memory.data_ptr())


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error of torch, which says what happened; the rest is advice."""
    return str(error).partition(". ")[0]


def hold(device: torch.device, mib: int | None) -> None:
    """Make torch's allocator hold at least so many MiB of the device, so that no other process has them.

    It holds them until the cache is emptied. If there are fewer, that is logged and none are taken.
    """
    if mib is None or device.type != "cuda":
        return
    blocks = []  # kept, since one that comes out of the cache adds nothing
    try:
        # Asked first: torch would empty the cache before it says that there is too little.
        if (free := free_bytes(device)) < mib * MIB:
            raise torch.OutOfMemoryError(f"this process can have {free // MIB} MiB in all")
        while (missing := mib * MIB - torch.cuda.memory_reserved(device)) > 0:
            blocks.append(torch.empty(missing, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError as e:
        log.get().warning(
            "engine.memory_not_reserved",
            wanted_mib=mib,
            reserved_mib=torch.cuda.memory_reserved(device) // MIB,
            reason=first_sentence(e),
        )
