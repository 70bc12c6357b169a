"""`polyclinic generate`: a model goes on with a text, and says which experts each token used. Needs no cluster."""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.commands.use_options import Mix, Owners, chosen, load, mix_in
from moe.errors import InputError

if TYPE_CHECKING:
    from moe.hf.folder import ModelFolder

COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red")
ANCHOR = "anchor"
LEAST_TEMPERATURE = 1e-6  # by less than that logits are divided out of float32's range


def generate(
    model: Annotated[Path, typer.Argument(help="A model's folder, such as runs/quickstart/model.")],
    prompt: Annotated[str | None, typer.Argument(help="The text to go on with; default: the standard input.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up so much of all.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the drawing: the same, and so are the tokens.")]
    = 0,
    owners: Owners = None,
    mix: Mix = None,
    experts: Annotated[bool, typer.Option("--experts", help="Show each token's expert in every layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print tokens (with --experts theirs), for scripts.")] = False,
) -> None:
    """Go on with PROMPT, token by token.

    Examples: polyclinic generate runs/quickstart/model "The chest radiograph shows" --experts;
    polyclinic generate runs/quickstart/model "Modifier 25" --owners billing --temperature 0
    """
    try:
        text = sys.stdin.read() if prompt is None else prompt
        text.encode()  # an argument of other bytes has surrogates
    except UnicodeError as error:
        raise InputError("the prompt is not in UTF-8: want text that is") from error
    if not text:
        raise InputError("the prompt is empty: want text, as an argument or on the standard input")
    if temperature and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise InputError(f"--temperature {temperature:g}: want 0, or at least {LEAST_TEMPERATURE:g} and finite")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p:g}: want more than 0 and at most 1")
    from moe.data import tokenizer as tokenizers

    loaded = load(model)
    if owners is not None:
        loaded.use(chosen(owners))
    mix_in(loaded, mix)
    begin, end = tokenizers.ends(loaded.tokenizer, loaded.special)
    prompt_ids = [begin, *loaded.tokenizer.encode(text, add_special_tokens=False).ids]
    most = loaded.decoder.config.context_length - len(prompt_ids)
    if most < 1:
        raise InputError(f"the prompt has {len(prompt_ids)} tokens: want fewer than model.context_length="
                         f"{loaded.decoder.config.context_length}")
    names = _names(loaded)
    screen = None if as_json else _Screen(loaded, prompt_ids, names, experts)
    tokens, used = list(prompt_ids), []
    for token, routes in _steps(loaded, prompt_ids, min(max_tokens, most), temperature, top_p, seed):
        used += _used(routes, names)
        if token == end:
            break
        tokens.append(token)
        if screen:
            screen.add(token, used)
    if screen:
        screen.end(tokens, used)
        return
    rows: list[dict[str, Any]] = [{"id": token, "text": loaded.tokenizer.decode([token], skip_special_tokens=False)}
                                  for token in tokens]
    if experts:
        for row, layers in zip(rows, used, strict=False):  # the last one has been read by nobody
            row["experts"] = layers
    print(json.dumps({"prompt_tokens": len(prompt_ids), "ended": token == end, "tokens": rows,
                      "text": loaded.tokenizer.decode(tokens[len(prompt_ids):])}, ensure_ascii=False))


def _steps(loaded: "ModelFolder", prompt_ids: list[int], most: int, temperature: float, top_p: float, seed: int):
    """(token, routes of what was read before it), one by one."""
    import torch

    from moe.eval.generate import steps

    generator = torch.Generator().manual_seed(seed)
    for step in steps(loaded.decoder, [prompt_ids], most, temperature=temperature, top_p=top_p, generator=generator):
        yield step.token_B.item(), step.routes


def _names(loaded: "ModelFolder") -> dict[int, str] | None:
    """Of each slot of a merged model; None for others, whose experts have numbers."""
    if not loaded.owners:
        return None
    return {slot: ANCHOR for slot in loaded.decoder.slots} | {slot: name for name, slot in loaded.owners.items()}


def _used(routes, names: dict[int, str] | None) -> list[list[list[tuple[Any, float]]]]:
    """[T][L] lists of (expert, weight), the heaviest first."""
    layers = []
    for route in routes:
        both = zip(route.slot_TK.tolist(), route.weight_TK.float().tolist(), strict=True)
        layers.append([sorted(((names[slot] if names else slot, round(weight, 4))
                               for slot, weight in zip(slots, weights, strict=True)),
                              key=lambda pair: -pair[1]) for slots, weights in both])  # fmt: skip
    return [list(of_layers) for of_layers in zip(*layers, strict=True)]


class _Screen:
    """Text as it comes. With `experts`, tokens of a merged model have the color of the owner that most layers chose
    for them, which is known once they have been read: each one is shown when the next has come."""

    def __init__(self, loaded: "ModelFolder", prompt_ids: list[int], names: dict[int, str] | None, experts: bool):
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._experts = loaded.tokenizer, experts
        self._console = Console(highlight=False, soft_wrap=True)
        self._stream = DecodeStream(ids=prompt_ids[1:], skip_special_tokens=True)
        self._colors = dict(zip(sorted(set(names.values()) - {ANCHOR}), COLORS, strict=False)) if names else {}
        self._layers = [name.split(".")[1] for name in loaded.decoder.mixtures()]
        self._shown, self._waiting, self._prompt = len(prompt_ids), [], len(prompt_ids)
        if self._colors and experts:
            legend = Text(" ").join(Text(name, style=color) for name, color in self._colors.items())
            self._console.print(legend)

    def add(self, token: int, used: list) -> None:
        self._waiting.append(token)
        if not (self._experts and self._colors):
            self._show(None)
        elif len(self._waiting) > 1:
            self._show(used[self._shown])

    def _show(self, layers: list | None) -> None:
        piece = self._stream.step(self._tokenizer, self._waiting.pop(0))
        self._shown += 1
        style = ""
        if layers:
            first = [pairs[0][0] for pairs in layers]
            style = self._colors.get(max(first, key=first.count), "")
        if piece:
            self._console.print(Text(piece, style=style), end="")

    def end(self, tokens: list[int], used: list) -> None:
        while self._waiting:
            self._show(used[self._shown] if self._colors and self._shown < len(used) else None)
        self._console.print()
        if self._experts and used:
            self._console.print(self._table(tokens, used), soft_wrap=False)
        self._console.print("Not for clinical use.", style="dim")

    def _table(self, tokens: list[int], used: list) -> Table:
        made = Table(title=f"each token's heaviest expert and its weight; the first {self._prompt} are the prompt's")
        for heading in ("token", *(f"layer {number}" for number in self._layers)):
            made.add_column(heading, no_wrap=True)
        for token, layers in zip(tokens, used, strict=False):
            cells = [Text(f"{name} {weight:.2f}", style=self._colors.get(name, "")) for (name, weight), *_ in layers]
            made.add_row(Text(repr(self._tokenizer.decode([token], skip_special_tokens=False))[1:-1]), *cells)
        return made
