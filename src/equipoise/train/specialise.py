"""A run's experts on held-out text: which serve which domain, token class, position and token; and since when.

`specialise` loads the model, puts held-out text through every kept checkpoint, notes at the taps who goes where, and
makes a `Roles` of it. The counting is in `monitor/specialisation_counts.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from equipoise.disk.atomic import atomic_write
from equipoise.disk.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, read_state
from equipoise.models.device import pick_device
from equipoise.models.run_files import MODEL, Loaded, fill, load
from equipoise.models.tokenizers import AnyTokenizer
from equipoise.monitor.specialisation import (
    DOMAIN,
    FILE_NAME,
    POSITION,
    TOKEN_CLASS,
    LayerRoles,
    Roles,
    Saturation,
)
from equipoise.monitor.specialisation_counts import (
    CLASSES,
    documents_swapped,
    most_served,
    overlap,
    overlap_by_chance,
    position_bucket,
    position_names,
    split,
    token_class,
    vocabulary,
    windows_turned,
)
from equipoise.train.corpus import corpus
from equipoise.train.data import TokenStream
from equipoise.train.loop import load_config
from equipoise.train.run import open_data
from equipoise.train.sources import DataError
from equipoise.train.specialisation import RoutedText, route_text

NUM_TOKENS = 32_768
NUM_CONTROLS = 499  # the smallest p-value is 1/500
NUM_CONTROLS_VOCABULARY = 99
BATCH_TOKENS = 4096
MAX_WINDOW = 512
MAX_TOKENS_SHOWN, MAX_TOKENS_IN_ALL = 24, 20_000  # of one expert; of all experts and layers, which bounds the file
MAX_TEXT = 32  # characters of one token

Advance = Callable[[int, int, str], None]  # tokens done, of how many, what is under way


@dataclass(frozen=True, eq=False)
class Text:
    """Held-out text to route. window: tokens that the model sees at once. told: where it is from. notes: what lacks."""

    stream: TokenStream
    window: int
    told: str
    bf16: bool = False
    notes: tuple[str, ...] = ()


def specialise(
    run: str | Path,
    *,
    num_tokens: int = NUM_TOKENS,
    data: str | None = None,
    advance: Advance = lambda done, total, what: None,
) -> Roles:
    """What each expert of a run serves.

    run: a run folder, or a checkpoint in one. num_tokens: about so many, spread evenly over the text. data: a .jsonl,
    .txt or .parquet file or a folder of them, with domains; by default the run's own held-out text. Raises ValueError
    for a run without MoE layers or checkpoints, and where there is no text. It writes nothing.
    """
    loaded = load(run, device=pick_device("auto"))
    if not loaded.model.moe_layers:
        raise ValueError(f"{loaded.folder}: expected a model with MoE layers, got a dense one; it has no experts")
    text = text_of_file(loaded, data, num_tokens) if data is not None else text_of_run(loaded)
    if num_tokens < text.window:
        raise ValueError(
            f"tokens: expected at least {text.window}, one window of the model's, got {num_tokens}; 32768 are enough"
        )
    earlier = _earlier(loaded)
    batch = max(1, min(BATCH_TOKENS, num_tokens) // text.window)
    batches = max(1, round(num_tokens / text.window / batch))
    windows = min(batches * batch, (text.stream.num_tokens - 1) // text.window)
    total, done = windows * text.window * (1 + len(earlier)), 0

    def route(what: str) -> RoutedText:
        def count(tokens: int) -> None:
            nonlocal done
            done += tokens
            advance(done, total, what)

        return route_text(loaded.model, text.stream, batch, text.window, batches, text.bf16, count)

    late = route(loaded.checkpoint.name)
    layers = roles_of(late, text, loaded.tokenizer, lambda name: advance(done, total, f"counting {name}"))
    saturation, notes = _saturation(loaded, earlier, late, route)
    return Roles(
        step=read_state(loaded.checkpoint)[0],
        text=text.told,
        num_tokens=len(late.positions_T),
        num_documents=len(np.unique(_documents(late))),
        window=text.window,
        layers=layers,
        saturation=saturation,
        notes=(*text.notes, *_domain_notes(late), *notes),
    )


def write_roles(folder: Path, roles: Roles) -> Path:
    """Keep them with the run, whole or not at all. Returns the file's path."""
    with atomic_write(folder / FILE_NAME) as file:
        file.write(roles.to_json())
    return folder / FILE_NAME


# ------------------------------------------------------------------------------------------------------- which text


def text_of_run(loaded: Loaded) -> Text:
    """The validation split of what the run was trained on, with domains; else the tokens that were kept with it."""
    try:
        config, opened = open_data(load_config(loaded.folder), loaded.folder)
        if opened.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
            raise DataError("the corpus has changed: its tokenizer is not the run's.")
        told = f"validation split of the corpus {Path(config.data.corpus).name}"
        return Text(opened.val, config.data.seq_len, told, config.bf16)
    except ValueError as error:
        if loaded.held_out_BS is None:
            raise ValueError(
                f"{loaded.folder}: expected text to route, but the run's own is not there ({error}) and none was kept "
                "with it; say --data FILE.jsonl, with a field text and, where known, domain"
            ) from error
        why = f"the text that the run was trained on is not there ({error}), so domains are not known"
        return Text(
            stream_of_rows(loaded.held_out_BS, loaded.tokenizer),
            loaded.held_out_BS.shape[1] - 1,
            "held-out tokens kept with the run",
            notes=(why,),
        )


def text_of_file(loaded: Loaded, data: str, num_tokens: int) -> Text:
    """Text of a file or folder, encoded with the run's tokenizer. It is for the caller to say that it was held out."""
    opened = corpus(data)
    held = loaded.held_out_BS
    window = min(loaded.model.config.max_seq_len, MAX_WINDOW if held is None else held.shape[1] - 1)
    order = np.random.default_rng(0).permutation(len(opened.documents))
    parts, domains, have = [], [], 0
    for index in order:  # documents at random, until there is enough
        document = opened.documents[int(index)]
        ids = np.append(loaded.tokenizer.encode(document.text), loaded.tokenizer.eot_id).astype(np.int64)
        parts.append(ids)
        domains.append(document.domain)
        have += len(ids)
        if have > num_tokens:
            break
    if have <= window:
        raise DataError(f"data: expected more than {window} tokens, one window, got {have} in {data}; use more text")
    if (highest := max(int(part.max()) for part in parts)) >= loaded.model.config.vocab_size:
        raise DataError(
            f"data: the tokenizer gives id {highest}, the model knows {loaded.model.config.vocab_size}; the run "
            "folder's files are not of one model, restore them"
        )
    ends = np.cumsum([len(part) for part in parts])
    stream = TokenStream(
        np.concatenate(parts), ends, np.array(domains), opened.domains, np.zeros(len(opened.domains)), ""
    )
    return Text(stream, window, f"text of {Path(data).name}")


def stream_of_rows(held_out_BS: Tensor, tokenizer: AnyTokenizer) -> TokenStream:
    """The kept tokens as a stream: each row a document, all of one domain. The last token is no input of any window."""
    rows_BS = held_out_BS[:, :-1].numpy()
    tokens_N = np.append(rows_BS.reshape(-1), tokenizer.eot_id)
    ends_M = np.arange(1, len(rows_BS) + 1) * rows_BS.shape[1]
    ends_M[-1] += 1
    domains_M = np.zeros(len(rows_BS), dtype=np.int64)
    return TokenStream(tokens_N, ends_M, domains_M, ("held-out",), np.zeros(1), "")


# --------------------------------------------------------------------------------------------------------- counting


def roles_of(
    late: RoutedText, text: Text, tokenizer: AnyTokenizer, counting: Callable[[str], None] = lambda layer: None
) -> tuple[LayerRoles, ...]:
    """A record per layer. Controls: domains are swapped by documents, the other labels are turned inside windows."""
    tokens_T = np.asarray(text.stream.tokens_N[late.positions_T]).astype(np.int32)
    ids, index_T = np.unique(tokens_T, return_inverse=True)
    pieces = {int(id): tokenizer.bytes_of(int(id)) for id in ids}
    class_U = np.array([CLASSES.index(token_class(pieces[int(id)])) for id in ids])
    names, groups, controls = {}, {}, {}
    for name, labels_T, kinds in (
        (TOKEN_CLASS, class_U[index_T.reshape(-1)], CLASSES),
        (POSITION, position_bucket(np.arange(len(tokens_T)) % text.window), position_names(text.window)),
    ):
        groups[name], names[name] = _present(labels_T, kinds)
        controls[name] = windows_turned(groups[name], text.window, NUM_CONTROLS, seed=0)
    domains_T = text.stream.domains_of(late.positions_T)
    if len(np.unique(domains_T)) > 1:
        present, names[DOMAIN] = _present(text.stream.domains_M, text.stream.domains)
        documents_T = _documents(late)
        groups[DOMAIN] = present[documents_T]
        controls[DOMAIN] = documents_swapped(present, documents_T, NUM_CONTROLS, seed=0)
    turned = windows_turned(tokens_T, text.window, NUM_CONTROLS_VOCABULARY, seed=0)
    controls_by_id = {id: name for name, id in tokenizer.controls.items()}
    limit = max(1, min(MAX_TOKENS_SHOWN, MAX_TOKENS_IN_ALL // sum(late.num_experts.values())))

    def of_layer(layer: str) -> LayerRoles:
        counting(layer)
        assignments, num_experts = late.assignments[layer], late.num_experts[layer]
        return LayerRoles(
            layer=layer,
            num_tokens=len(tokens_T),
            load=tuple(np.bincount(assignments[1], minlength=num_experts).tolist()),
            splits={
                kind: split(names[kind], groups[kind], assignments, num_experts, controls[kind])
                for kind in (DOMAIN, TOKEN_CLASS, POSITION)
                if kind in groups
            },
            vocabulary=vocabulary(tokens_T, assignments, num_experts, turned),
            tokens=most_served(
                tokens_T,
                assignments,
                num_experts,
                lambda id: _shown(pieces[id], controls_by_id.get(id, f"<{id}>")),
                limit,
            ),
        )

    return tuple(of_layer(layer) for layer in late.assignments)


def _present(labels: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and names without those that do not occur; int16, because there are hundreds of controls."""
    kinds, numbers = np.unique(labels, return_inverse=True)
    return numbers.reshape(-1).astype(np.int16), tuple(names[int(kind)] for kind in kinds)


def _documents(text: RoutedText) -> np.ndarray:
    return np.searchsorted(text.stream.ends_M, text.positions_T, side="right")


def _domain_notes(text: RoutedText) -> tuple[str, ...]:
    domains = np.unique(text.stream.domains_of(text.positions_T))
    if len(domains) > 1 or len(text.stream.domains) == 1:
        return ()
    return (f"all tokens that were routed are of one domain, {text.stream.domains[int(domains[0])]}; raise --tokens",)


def _shown(piece: bytes, name: str) -> str:
    """A token as text: line ends as in `repr`, spaces kept, bytes that are no text in hex, no bytes by its name."""
    if not piece:
        return name[:MAX_TEXT]
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return " ".join(f"{byte:02x}" for byte in piece[: MAX_TEXT // 3])
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)[:MAX_TEXT]


# -------------------------------------------------------------------------------------------------------- over time


def _earlier(loaded: Loaded) -> list[Path]:
    """The whole checkpoints before the one that was loaded, the oldest first."""
    found = list_checkpoints(loaded.checkpoint.parent)
    places = [path.name for path in found]
    return found[: places.index(loaded.checkpoint.name)] if loaded.checkpoint.name in places else []


def _saturation(
    loaded: Loaded, earlier: list[Path], late: RoutedText, route: Callable[[str], RoutedText]
) -> tuple[Saturation, tuple[str, ...]]:
    """Each checkpoint's choices against the last one's. The model is left with other weights than it had."""
    steps, notes = [], []
    shares: dict[str, list[float]] = {layer: [] for layer in late.assignments}
    chances: dict[str, list[float]] = {layer: [] for layer in late.assignments}

    def compare(step: int, text: RoutedText) -> None:
        steps.append(step)
        for layer, assignments in late.assignments.items():
            num_experts = late.num_experts[layer]
            shares[layer].append(overlap(text.assignments[layer], assignments, num_experts))
            chances[layer].append(
                overlap_by_chance(text.assignments[layer], assignments, len(late.positions_T), num_experts)
            )

    for path in earlier:
        try:
            checkpoint = load_checkpoint(path)
            fill(loaded.model, checkpoint.tensors[MODEL], path)
        except (CheckpointError, KeyError) as error:
            notes.append(f"{path.name} is left out: {error}")
            continue
        compare(checkpoint.step, route(path.name))
    compare(read_state(loaded.checkpoint)[0], late)
    if len(steps) == 1:
        notes.append("only one checkpoint was kept, so saturation is not known; train with more keep_checkpoints")
    found = Saturation(
        tuple(steps),
        {layer: tuple(each) for layer, each in shares.items()},
        {layer: tuple(each) for layer, each in chances.items()},
    )
    return found, tuple(notes)
