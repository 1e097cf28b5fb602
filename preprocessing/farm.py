"""The farm: ranks that turn a manifest's media and captions into the shards of a corpus.

Ranks stand in groups of one encode rank and its decode ranks, on one machine. Encode ranks claim
shards and have their items decoded; one without decode ranks decodes in threads of its own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from megatron_nuwa.data.shards import CorpusManifest
from megatron_nuwa.data.text import TextTokenizer
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.vqgan import Vqgan
from preprocessing import attempts
from preprocessing.attempts import Attempts
from preprocessing.communicator import (
    Claims,
    Communicator,
    MessageKind,
    held_on_first_rank,
    on_every_rank,
    on_first_rank,
)
from preprocessing.decode_worker import DecodeThreads, ItemDecoder
from preprocessing.duplicates import take_out_duplicates
from preprocessing.encode_loop import Decoder, EncodeLoop, Work
from preprocessing.encoder import Encoders, EncoderSettings, FrameEncoder, engine
from preprocessing.figures import Figures
from preprocessing.isolation import Demands
from preprocessing.ledger import FAILURES_FILE, CorpusSettings, Ledger
from preprocessing.options import (
    TokenizeOptions,
    load_sketch_vqgan,
    load_tools,
    plan_key,
    settle,
)
from preprocessing.plan import Plan, PlanStamp
from preprocessing.remote_decoders import RemoteDecoders, serve_encode_rank
from preprocessing.report import write_report
from preprocessing.roles import Roles, agree_on_roles
from preprocessing.sources import Source, read_source
from preprocessing.state import FarmFolder, writing
from preprocessing.watch import Watch

SHOWN_FAILURES = 5
REPORT_SECONDS = 0.5
IDLE_SECONDS = 0.02


class _Farm:
    """One run of the farm on one rank."""

    def __init__(
        self,
        options: TokenizeOptions,
        communicator: Communicator,
        tools: tuple[Vqgan, TextTokenizer],
        sketch_vqgan: Vqgan | None,
        settings: CorpusSettings,
        roles: Roles,
    ) -> None:
        self._options = options
        self._communicator = communicator
        self._vqgan, self._bpe = tools
        self._sketch_vqgan = sketch_vqgan
        self._settings = settings
        self._folder = FarmFolder(options.output)
        self._roles = roles
        self._group = roles.group_of(communicator.rank)
        self.loop: EncodeLoop | None = None
        self.encoders: Encoders | None = None

    def run(self, work: Work, claims: Claims, watch: Watch | None) -> None:
        """This rank's part of the work."""
        ranks, rank = self._communicator, self._communicator.rank
        if rank != self._group.encode_rank:
            with self._threads() as own:
                serve_encode_rank(ranks, self._group.encode_rank, own)
            return
        self.encoders = Encoders(
            self._encoder_of(self._vqgan),
            None if self._sketch_vqgan is None else self._encoder_of(self._sketch_vqgan),
        )
        with self._decoders() as (decoders, receive):
            threads = len(decoders) * self._options.decode_threads
            self.loop = EncodeLoop(work, self.encoders, decoders, claims, receive, threads)
            self._encode(self.loop, watch)
        if watch is None:
            ranks.send(0, MessageKind.REPORT, (self.loop.take_figures(), True))
        else:
            self._await_others(watch)

    def _encoder_of(self, vqgan: Vqgan) -> FrameEncoder:
        return FrameEncoder(
            vqgan, self._settings.encoder, self._settings.frames_at_once, self._group.gpu
        )

    def _encode(self, loop: EncodeLoop, watch: Watch | None) -> None:
        told = time.monotonic()
        for _ in loop.run():
            if self._communicator.is_asked_to_stop():
                return
            now = time.monotonic()
            if watch is not None:
                watch.add(loop.take_figures())
                self._receive_reports(watch)
                watch.tick()
            elif now - told >= REPORT_SECONDS:
                told = now
                self._communicator.send(0, MessageKind.REPORT, (loop.take_figures(), False))
        if watch is not None:
            watch.add(loop.take_figures())

    def _await_others(self, watch: Watch) -> None:
        """On the first rank: show the progress of the others until they are done."""
        others = len(self._roles.groups) - 1
        while self._ended < others and not self._communicator.is_asked_to_stop():
            self._receive_reports(watch)
            watch.tick()
            time.sleep(IDLE_SECONDS)

    _ended = 0

    def _receive_reports(self, watch: Watch) -> None:
        while message := self._communicator.receive(MessageKind.REPORT):
            figures, ended = message[1]
            watch.add(figures)
            self._ended += ended

    @contextmanager
    def _decoders(self) -> Iterator[tuple[Sequence[Decoder], Callable[[], None]]]:
        """What an encode rank has its items decoded by, and what takes in the results."""
        if not self._group.decode_ranks:
            with self._threads() as threads:
                yield [threads], lambda: None
            return
        with RemoteDecoders(self._communicator, self._group.decode_ranks) as remote:
            yield list(remote.decoders.values()), remote.receive
            remote.dismiss()

    @contextmanager
    def _threads(self) -> Iterator[DecodeThreads]:
        decoder = ItemDecoder(
            self._bpe,
            Demands(
                self._settings.decode,
                self._options.limits,
                self._settings.filters,
                self._settings.sketch,
            ),
            self._settings.long_captions == "truncate",
            self._options.attempts,
        )
        threads = DecodeThreads(decoder, self._folder.attempts, self._options.decode_threads)
        try:
            yield threads
        finally:
            threads.close()


def tokenize(options: TokenizeOptions, communicator: Communicator) -> None:
    """Make a corpus, or complete one; every rank makes this call.

    Raises `UserError` (on the first rank, `PeerFailed` on the others) before anything is written
    where the manifest, the VQ-GAN, the BPE or the output folder will not do, and where not a
    single item is good.
    """
    on_first_rank(communicator, lambda: _check_ranks(options, communicator.size))
    tools = on_every_rank(communicator, lambda: load_tools(options))
    sketch_vqgan = on_every_rank(communicator, lambda: load_sketch_vqgan(options, tools[0]))
    folder = FarmFolder(options.output)
    plan = Plan(folder.plan, options.items_per_shard)
    # Only the first rank reads the whole source, and only where there is no plan of it; the others
    # read the plan of a shard at a time.
    is_first = communicator.rank == 0
    source = on_every_rank(
        communicator,
        lambda: read_source(options.source, checked=False, is_shown=True) if is_first else None,
    )

    def settled() -> CorpusSettings:
        assert source is not None
        return settle(options, source, *tools, sketch_vqgan)

    settings = on_first_rank(communicator, settled)
    ledger = Ledger(options.output, settings)
    if on_first_rank(communicator, lambda: _is_finished(ledger, options)):
        if communicator.rank == 0:
            print(f"corpus {options.output} is finished already", flush=True)
        return
    with held_on_first_rank(communicator, folder.locked()), _kept_from_collector():
        roles = agree_on_roles(communicator, settings.encoder, options.decode_ranks_per_encoder)
        engines = _engines(communicator, roles, settings.encoder)
        work = on_first_rank(
            communicator, lambda: _begin(ledger, plan, source, folder, options, engines)
        )
        claims = communicator.claims()
        farm = _Farm(options, communicator, tools, sketch_vqgan, settings, roles)
        total = sum(len(settings.rows(shard)) for shard in work.pending)
        watch = None
        if communicator.rank == 0:
            done = settings.manifest_items - total
            watch = Watch(total, settings.decode.frames, folder.tensorboard, str(roles), done)
            if communicator.size > 1 or settings.encoder.device == "cuda":
                print(f"tokenize: {roles}", flush=True)
        with watch or nullcontext():
            on_every_rank(communicator, lambda: farm.run(work, claims, watch))
        claims.close()
        rule = settings.filters.near_duplicates
        if rule is not None:
            take_out_duplicates(options.output, folder.looks, settings.shards, rule, communicator)

        def finish() -> None:
            assert source is not None
            planned = plan.stamp(plan_key(options, source))
            _finish(ledger, options, folder, work.pending, watch, farm, planned)

        on_first_rank(communicator, finish)


@contextmanager
def _kept_from_collector() -> Iterator[None]:
    """Have Python's garbage collector pass over all that is loaded by now.

    It would look through PyTorch's and the tools' objects anew for every few hundred items that are
    read, which takes several times as long as the reading.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _check_ranks(options: TokenizeOptions, ranks: int) -> None:
    if options.decode_ranks_per_encoder and ranks == 1:
        raise UserError(
            f"--decode-ranks-per-encoder {options.decode_ranks_per_encoder} needs several ranks, "
            "and this process is alone: start it with mpirun -n N, or leave the option out"
        )


def _is_finished(ledger: Ledger, options: TokenizeOptions) -> bool:
    """Whether nothing is to be done; `UserError` where the output folder is another corpus's."""
    with writing(options.output):
        ledger.check()
        return ledger.is_finished() and not (options.retry_failed and ledger.has_failed())


def _begin(
    ledger: Ledger,
    plan: Plan,
    source: Source | None,
    folder: FarmFolder,
    options: TokenizeOptions,
    engines: Sequence[str],
) -> Work:
    """Open the corpus for writing, and say what is left to do."""
    assert source is not None
    key = plan_key(options, source)
    with writing(options.output):
        new = ledger.is_new()
        # A retry that was interrupted goes on: what it has made is not made once more, and an item
        # that has killed its rank is known by it. A note beside a whole corpus is of an ended one.
        goes_on = not new and not ledger.is_committed() and folder.is_retrying(options.costs)
        reopens = options.retry_failed and not goes_on
        try:
            # First: a farm that is killed later must not leave the attempts of a corpus that was
            # deleted, or of items that are given another chance, to the next one.
            if new or reopens:
                folder.forget_retry()
                attempts.forget(folder.attempts)
            ledger.begin()
        except OSError:
            if new:
                folder.discard()
            raise
        if reopens:
            ledger.reopen_failed()
    with writing(folder.path, "farm folder"):
        if reopens:
            folder.note_retry(options.costs)
        _note_engines(folder, engines, new)
        pending = ledger.pending()
        if pending and plan.stamp(key) is None:
            plan.write(source, key, ledger.settings.manifest_items)
        counts = attempts.collect(folder.attempts)
    return Work(
        pending,
        plan,
        ledger.settings,
        options.output,
        source.folder,
        _of_shards(counts, pending, ledger.settings),
        options.most_failures,
    )


def _engines(communicator: Communicator, roles: Roles, settings: EncoderSettings) -> list[str]:
    """What the encode ranks encode with; every rank must make this call."""
    group, rank = roles.group_of(communicator.rank), communicator.rank

    def own() -> str | None:
        return engine(settings, group.gpu) if rank == group.encode_rank else None

    found = communicator.gather_everywhere(on_every_rank(communicator, own))
    return sorted({name for name in found if name is not None})


def _note_engines(folder: FarmFolder, engines: Sequence[str], new: bool) -> None:
    """Put down what the corpus is encoded with, and warn where it is more than one thing.

    A warning, since the tokens differ in so few places that to refuse the other half of the GPUs,
    or to encode everything anew after an upgrade, would cost more than it saves.
    """
    noted = folder.note_engines(engines, new)
    if len(noted) > 1:
        print(
            f"warning: this corpus is encoded with {' and with '.join(noted)}, so some tokens, "
            "whose two nearest codes are all but equally near, may differ from those of one alone",
            flush=True,
        )


def _of_shards(
    counts: Mapping[int, Attempts], pending: Sequence[int], settings: CorpusSettings
) -> dict[int, Attempts]:
    """The attempts at items of shards that are to be made: every rank holds them."""
    wanted = set(pending)
    return {row: each for row, each in counts.items() if row // settings.items_per_shard in wanted}


def _finish(
    ledger: Ledger,
    options: TokenizeOptions,
    folder: FarmFolder,
    made: Sequence[int],
    watch: Watch | None,
    farm: _Farm,
    planned: PlanStamp | None,
) -> None:
    """Commit the corpus and say what became of the items."""
    assert watch is not None
    with writing(options.output):
        manifest = ledger.commit()
        failures = ledger.first_failures(SHOWN_FAILURES)
        if manifest is None:
            reason = ledger.first_reason()
            ledger.discard()
            folder.discard()
            raise UserError(
                f"all {ledger.settings.manifest_items} items of {options.source} failed or were "
                f"left out, so there is no corpus; the first: {reason}"
            )
    # The corpus is whole: what a disk keeps that has become read-only is in nobody's way.
    with suppress(OSError):
        folder.forget_retry()
        attempts.forget(folder.attempts)
    folder.forget_plan()
    _tell(options.output, manifest, len(made), watch.figures, watch.seconds)
    for name, count in manifest.counts.left_out.items():
        print(f"  left out by {name}: {count}", flush=True)
    for failure in failures:
        print(f"  failed {failure.id}: {failure.reason}", flush=True)
    if manifest.counts.failed > len(failures):
        more = manifest.counts.failed - len(failures)
        print(f"  and {more} more, in {options.output / FAILURES_FILE}", flush=True)
    if options.report and farm.loop is not None and farm.encoders is not None:
        told = write_report(
            folder.report,
            options.output,
            farm.loop.samples.in_order(),
            farm.encoders,
            watch,
            folder.engines(),
            planned,
        )
        print(told, flush=True)


def _tell(
    output: Path, manifest: CorpusManifest, shards: int, figures: Figures, seconds: float
) -> None:
    print(
        f"corpus {output}: {manifest.counts.items} items, {manifest.counts.captions} captions, "
        f"{manifest.counts.failed} failed; {shards} shards in {seconds:.1f} s, "
        f"{figures.items / seconds:.1f} items/s",
        flush=True,
    )
