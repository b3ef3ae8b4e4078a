"""DMM (arXiv 2504.12364): several denoisers of one base distilled into one, which a style embedding steers.

The student is the base with a table ``E`` [T,d] of styles, d the width of its time embedding, and an MLP of two linear
layers with SiLU between, whose output is added to the time embedding. For a noised latent ``x_t`` every teacher ``i``
says ``eps_i = teacher_i(x_t, t, text_i)`` with the text of its own encoder, the student ``eps = student(x_t, t, text,
i)`` with the base's, and the loss is

    mean_i [ MSE(eps, eps_i) + w_f mean_blocks D(f, f_i) ],   w_f = 0.002,  D = MSE or 1 - cosine over channels

with the outputs ``f`` of the down, middle and up blocks (nine in Stable Diffusion 1.5). A style is a row of weights
[T]: one-hot is one teacher's, others are between (``sum_i a_i E_i``).

`StyleDistillation` is a module that returns this loss, for a factory of one's own: captured, planned and trained like
any (every teacher a branch, placed by the planner). `batches` is its loader. Denoisers are called as
``denoiser(latents, timesteps, text)`` and return the noise, a tuple or an object with ``sample``, as diffusers' UNets
do.

Here every sample goes to every teacher, where the authors' trainer has one teacher on each rank and other samples
there: the expected loss is the same, whatever the plan. The student starts as the base because the MLP's last layer is
zero (the check that an identical teacher costs nothing). Left out: the paper's adversarial loss on the noise, which
the released trainer does not have either, and an average of the weights over steps.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.expressions import check_expression, search
from mipipe.graphs.models.configuration import first_line
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.runtime.engine.batches import Batch
from mipipe.runtime.recipes.tables import read_tables

TENSORS = "latents.safetensors"
BLOCKS = r"^(down_blocks\.\d+|mid_block|up_blocks\.\d+)$"
"""Whose outputs are features: of diffusers' UNets."""
FEATURES = 0.002
STEPS, BETAS = 1000, (0.00085, 0.012)
"""Steps of the noise, and the first and last of its variances, whose roots are evenly apart (Stable Diffusion)."""


class StyledDenoiser(nn.Module):
    """A denoiser and ``styles`` rows of an embedding as wide as the output of its module ``time_embedding``."""

    def __init__(self, denoiser: nn.Module, styles: int, width: int, time_embedding: str = "time_embedding") -> None:
        super().__init__()
        if styles < 1 or width < 1:
            raise InputError(f"styles: found {styles} of width {width}, expected at least 1 each")
        try:
            denoiser.get_submodule(time_embedding)
        except AttributeError:
            raise InputError(f"styles: a {type(denoiser).__name__} has no module {time_embedding}; name the one that"
                             " makes its time embedding (time_embedding)") from None
        self.denoiser, self._time = denoiser, time_embedding
        self.styles = nn.Embedding(styles, width)
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, style: Tensor) -> Tensor:
        """The noise [B,C,H,W]; ``style`` [B,T] are weights of the styles."""
        added = self.mlp(style.to(self.styles.weight.dtype) @ self.styles.weight)
        hook = self.denoiser.get_submodule(self._time).register_forward_hook(lambda _module, _inputs, made:
                                                                             made + added)
        try:
            return noise(self.denoiser(latents, timesteps, text))
        finally:
            hook.remove()

    def with_more(self, count: int) -> StyledDenoiser:
        """A copy with ``count`` further styles, for further teachers; this one can be its ``previous``.

        One that only teaches (nothing of it trains) gives a copy that trains.
        """
        rows, width = self.styles.weight.shape
        grown = StyledDenoiser(copy.deepcopy(self.denoiser), rows + count, width, self._time)
        grown.mlp = copy.deepcopy(self.mlp)
        if not any(item.requires_grad for item in self.parameters()):
            grown.requires_grad_(True).train()
        with torch.no_grad():
            grown.styles.weight[:rows] = self.styles.weight
        return grown


def noise(output: Any) -> Tensor:
    """The predicted noise of what a denoiser returns."""
    found = getattr(output, "sample", output[0] if isinstance(output, tuple) else output)
    if not isinstance(found, Tensor):
        raise InputError(f"styles: a denoiser returned {type(output).__name__}; expected the noise, a tuple that begins"
                         " with it, or an object with 'sample'")
    return found


class StyleDistillation(nn.Module):
    """The loss of a student with a style for each teacher; only the student trains.

    Args:
        student: as many styles as ``previous`` has and there are teachers.
        teachers: denoisers; that of style ``i`` is the i-th.
        previous: a student of an earlier run, which teaches its own styles, the first ones here.
        features: the weight of the blocks' outputs; 0 leaves them out.
        distance: ``mse``, or ``cosine`` (1 - cosine over the channels of a position).
        blocks: a regular expression of the names of modules whose outputs are features.

    Raises:
        InputError: no teacher, another number of styles, no block of that name, or parameters that the student shares
            with a teacher, which would freeze them.
    """

    def __init__(self, student: StyledDenoiser, teachers: Sequence[nn.Module],
                 previous: StyledDenoiser | None = None, features: float = FEATURES, distance: str = "mse",
                 blocks: str = BLOCKS) -> None:
        super().__init__()
        old = 0 if previous is None else previous.styles.num_embeddings
        if not old + len(teachers):
            raise InputError("styles: found no teacher, expected at least one")
        if student.styles.num_embeddings != old + len(teachers):
            raise InputError(f"styles: the student has {student.styles.num_embeddings}, but there are {len(teachers)}"
                             f" teachers{f' and {old} styles of the previous student' if old else ''}")
        if distance not in ("mse", "cosine") or features < 0:
            raise InputError(f"styles: found distance {distance!r} and weight of features {features}; expected mse or"
                             " cosine, and no negative weight")
        check_expression(blocks, "blocks")
        mine = {id(item): name for name, item in student.named_parameters()}
        for who, teacher in (*((f"teacher {number}", item) for number, item in enumerate(teachers)),
                             *([] if previous is None else [("the previous student", previous)])):
            shared = next((mine[id(item)] for item in teacher.parameters() if id(item) in mine), None)
            if shared is not None:
                raise InputError(f"styles: the student's {shared} is also {who}'s, whose parameters do not train; give"
                                 " one of them a copy (copy.deepcopy)")
        self.student, self.teachers, self.previous = student, nn.ModuleList(teachers), previous
        self._features, self._distance = features, distance
        self._blocks = [name for name, _ in student.denoiser.named_modules() if search(blocks, name)]
        if features and not self._blocks:
            raise InputError(f"styles: no module of a {type(student.denoiser).__name__} matches {blocks!r}; give"
                             " blocks, or features: 0")
        for teacher in (*teachers, *([] if previous is None else [previous])):
            teacher.requires_grad_(False).eval()

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, teacher_text: Tensor | None = None
                ) -> dict[str, Tensor]:
        """``{"loss": ...}`` of noised latents [B,C,H,W], timesteps [B] and text [B,L,D]; ``teacher_text``
        [B,teachers,L,D] is each teacher's own."""
        styles, rows = self.student.styles.num_embeddings, len(latents)
        old = styles - len(self.teachers)
        weights = torch.eye(styles, dtype=text.dtype, device=text.device).repeat_interleave(rows, 0)

        def times(value: Tensor, count: int) -> Tensor:
            return value.repeat(count, *[1] * (value.dim() - 1))

        said, seen = self._watched(self.student.denoiser, lambda: self.student(
            times(latents, styles), times(timesteps, styles), times(text, styles), weights))
        wanted: list[tuple[Tensor, list[Tensor]]] = []
        with torch.no_grad():
            if self.previous is not None:
                teacher = self.previous
                whole = self._watched(teacher.denoiser, lambda: teacher(
                    times(latents, old), times(timesteps, old), times(text, old), weights[:rows * old, :old]))
                wanted.append(whole)
            for number, denoiser in enumerate(self.teachers):
                own = text if teacher_text is None else teacher_text[:, number]
                wanted.append(self._watched(denoiser, lambda denoiser=denoiser, own=own:
                                            noise(denoiser(latents, timesteps, own))))
        loss = nn.functional.mse_loss(said, torch.cat([one for one, _ in wanted]))
        if self._features:
            parts = [self._apart(mine, torch.cat([blocks[place] for _, blocks in wanted]))
                     for place, mine in enumerate(seen)]
            loss = loss + self._features * torch.stack(parts).mean()
        return {"loss": loss}

    def _watched(self, denoiser: nn.Module, call: Any) -> tuple[Tensor, list[Tensor]]:
        """What a call returns, and the outputs of the denoiser's blocks meanwhile, in the order of their names."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                found[name] = output[0] if isinstance(output, tuple) else output
            return hook

        hooks = [denoiser.get_submodule(name).register_forward_hook(keep(name))
                 for name in (self._blocks if self._features else ())]
        try:
            return call(), [found[name] for name in (self._blocks if self._features else ())]
        finally:
            for hook in hooks:
                hook.remove()

    def _apart(self, mine: Tensor, wanted: Tensor) -> Tensor:
        if self._distance == "mse":
            return nn.functional.mse_loss(mine, wanted)
        return 1 - nn.functional.cosine_similarity(mine, wanted, dim=1).mean()


def write_latents(out: str | Path, latents: Tensor, text: Tensor, empty: Tensor, teacher_text: Tensor | None = None,
                  teacher_empty: Tensor | None = None) -> None:
    """Write a folder of training data: what `batches` draws from.

    Args:
        latents: [N,C,H,W], as the denoisers' common autoencoder makes them of images.
        text, empty: [N,L,D] captions by the base's text encoder, and [L,D] the empty caption.
        teacher_text, teacher_empty: [N,teachers,L,D] and [teachers,L,D] by the teachers' own encoders.

    Raises:
        InputError: shapes that do not fit each other, or ``out`` exists.
    """
    folder, count = Path(out), len(latents)
    tensors = {"latents": latents, "text": text, "empty": empty}
    fits = latents.dim() == 4 and count > 0 and text.dim() == 3 and len(text) == count and empty.shape == text.shape[1:]
    if (teacher_text is None) is not (teacher_empty is None):
        fits = False
    if teacher_text is not None and teacher_empty is not None:
        tensors |= {"teacher_text": teacher_text, "teacher_empty": teacher_empty}
        fits = fits and teacher_text.dim() == 4 and len(teacher_text) == count \
            and teacher_empty.shape == teacher_text.shape[1:]
    if not fits:
        found = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items())
        raise InputError(f"latents: found {found}; expected [N,C,H,W], [N,L,D], [L,D] and, both or neither, teachers'"
                         " [N,T,L,D] and [T,L,D]")
    if folder.exists():
        raise InputError(f"{folder}: exists already; give another folder, or remove it")
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial / TENSORS)
    os.rename(partial, folder)


def signal_shares() -> Tensor:
    """The share of a latent's variance that is left at every step [STEPS]."""
    betas = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def batches(graph: OperatorGraph, rows: int, seed: int, folder: str, dropout: float = 0.1, copy: int = 0
            ) -> Iterator[Batch]:
    """Endless noised samples of a folder of `write_latents`, as a loader of ``train.yaml``.

    ``dropout``: the share of captions that are the empty one.
    """
    if not 0 <= dropout <= 1:
        raise InputError(f"latents: dropout: found {dropout}, expected a share from 0 to 1")
    found = read_tables(Path(folder) / TENSORS, "write_latents", {"latents": 4, "text": 3, "empty": 2})
    shares, draw = signal_shares(), torch.Generator().manual_seed((seed << 16) + copy)
    while True:
        chosen = torch.randint(len(found["latents"]), (rows,), generator=draw)
        steps = torch.randint(STEPS, (rows,), generator=draw)
        bare = torch.rand(rows, generator=draw) < dropout
        clean = found["latents"][chosen]
        share = shares[steps].to(clean.dtype)[:, None, None, None]
        drawn = torch.randn(clean.shape, generator=draw, dtype=torch.float32).to(clean.dtype)
        batch = {"latents": share.sqrt() * clean + (1 - share).sqrt() * drawn, "timesteps": steps}
        for name, none in (("text", "empty"), ("teacher_text", "teacher_empty")):
            if name in found:
                value = found[name][chosen]
                batch[name] = torch.where(bare.view(-1, *[1] * (value.dim() - 1)), found[none], value)
        yield batch


def trained_styles(folder: str | Path, student: StyledDenoiser) -> StyledDenoiser:
    """The student with the weights that ``mipipe train`` saved of a `StyleDistillation`; its teachers are left there.

    Raises:
        InputError: no such folder, or weights of another student.
    """
    path = Path(folder) / "model.safetensors"
    tensors = read_tables(path, "StyleDistillation, trained by mipipe train,", {})
    own: Mapping[str, Tensor] = {name.removeprefix("student."): value for name, value in tensors.items()
                                 if name.startswith("student.")}
    try:
        student.load_state_dict(own)
    except RuntimeError as error:
        raise InputError(f"{path}: holds another student ({first_line(error)})") from None
    return student
