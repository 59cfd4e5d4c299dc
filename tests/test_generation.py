"""The engine generates what transformers generates, the same under every cut, number of slots and order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rlhf.generation.ending import Ending
from nemo_rlhf.generation.sampling import SamplingParams, sample_tokens
from nemo_rlhf.generation.slots import Scheduler
from nemo_rlhf.parallel import state
from nemo_rlhf.types import Prompt, Request, Sample
from tests.spawn import run_distributed
from tests.workers import generation_worker as worker
from tests.workers.generation_worker import Run

NEW_TOKENS = 24
CORPUS = [
    "the cat sat on the mat",
    "the dog ate the hat",
    "über naïve café",
    "日本語 の 本",
    "stop. and go; then stop.",
    "emoji 🙂 🙃",
]


def make_tokenizer() -> Any:
    """A small byte-level BPE: characters beyond ASCII are split over several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=281, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_requests(count: int, longest: int = 20) -> tuple[Request, ...]:
    generator = random.Random(0)
    prompts = [tuple(generator.randrange(2, 281) for _ in range(generator.randint(1, longest))) for _ in range(count)]
    return tuple(Request(Prompt(ids, str(ids)), 100 + 7 * index) for index, ids in enumerate(prompts))


REQUESTS = make_requests(11)
SAMPLED = SamplingParams(NEW_TOKENS, seed=5)
GREEDY = SamplingParams(NEW_TOKENS, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llama() -> Any:
    """A Llama of transformers whose weights are large enough for its text to wander."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=281,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.12,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def hf_dir(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def run_here(directory: Path, *runs: Run) -> list[tuple[Sample, ...]]:
    state.set_environment_for_one_process()
    return worker.generate(directory, (1, 1), runs)


def tokens(samples: Sequence[Sample]) -> list[tuple[int, ...]]:
    return [sample.response_ids for sample in samples]


@pytest.fixture(scope="module")
def greedy(hf_dir: Path) -> tuple[Sample, ...]:
    return run_here(hf_dir, Run(REQUESTS, GREEDY, 4))[0]


@pytest.fixture(scope="module")
def sampled(hf_dir: Path) -> tuple[Sample, ...]:
    return run_here(hf_dir, Run(REQUESTS, SAMPLED, 4))[0]


def test_greedy_equals_transformers_token_for_token(llama: Any, greedy: tuple[Sample, ...]) -> None:
    for request, sample in zip(REQUESTS, greedy, strict=True):
        ids = torch.tensor([request.prompt.token_ids])
        with torch.no_grad():
            out = llama.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=1,
            )
        assert sample.response_ids == tuple(out[0, ids.size(1) :].tolist())
        assert sample.prompt == request.prompt
        assert sample.sample_index == request.sample_index
    assert len({token for sample in greedy for token in sample.response_ids}) > 30, "the text does not wander"


def test_sampling_follows_the_model_of_transformers(llama: Any, sampled: tuple[Sample, ...]) -> None:
    """Teacher-forced through transformers, every token is the one that the noise of its name picks."""
    for sample in sampled:
        prompt, response = sample.prompt.token_ids, sample.response_ids
        with torch.no_grad():
            logits = llama(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        position = torch.arange(len(prompt), len(prompt) + len(response))
        index = torch.full_like(position, sample.sample_index)
        drawn = sample_tokens(
            logits, vocab_start=0, vocab_size=281, sampling=SAMPLED, sample_index=index, position=position
        )
        assert response == tuple(drawn.tolist())


@pytest.mark.parametrize("num_slots", [1, 3, 8, 64])
def test_number_of_slots_and_order_do_not_matter(hf_dir: Path, sampled: tuple[Sample, ...], num_slots: int) -> None:
    shuffled = list(REQUESTS)
    random.Random(num_slots).shuffle(shuffled)
    in_order, out_of_order = run_here(
        hf_dir, Run(REQUESTS, SAMPLED, num_slots), Run(tuple(shuffled), SAMPLED, num_slots)
    )
    assert in_order == sampled
    assert [sample.sample_index for sample in out_of_order] == [request.sample_index for request in shuffled]
    assert sorted(out_of_order, key=lambda sample: sample.sample_index) == list(sampled)


def test_samples_of_one_prompt_differ(hf_dir: Path) -> None:
    prompt = REQUESTS[0].prompt
    requests = tuple(Request(prompt, index) for index in range(6))
    first, second = run_here(hf_dir, Run(requests, SAMPLED, 6), Run(requests, replace(SAMPLED, seed=6), 6))
    assert len(set(tokens(first)) | set(tokens(second))) == 12


RUNS = (
    Run(REQUESTS, SAMPLED, 3),
    Run(REQUESTS[::-1], SAMPLED, 8),
    Run(REQUESTS, GREEDY, 3),
    Run(REQUESTS, replace(SAMPLED, top_k=9, temperature=1.2), 4),
    Run(REQUESTS, replace(SAMPLED, top_p=0.7), 4),
    Run(REQUESTS, replace(SAMPLED, stop=("e", "t")), 5),
    Run(REQUESTS[:1], SAMPLED, 1),  # fewer slots than pipeline stages
)


@pytest.fixture(scope="module")
def reference_runs(hf_dir: Path) -> list[tuple[Sample, ...]]:
    return run_here(hf_dir, *RUNS)


@pytest.mark.parametrize(("world_size", "cuts"), [(2, [(2, 1), (1, 2)]), (4, [(2, 2), (1, 4)])], ids=["two", "four"])
def test_every_cut_generates_the_same(
    hf_dir: Path, reference_runs: list[tuple[Sample, ...]], world_size: int, cuts: list[tuple[int, int]]
) -> None:
    payload = {"directory": hf_dir, "cuts": cuts, "runs": RUNS}
    for by_cut in run_distributed("tests.workers.generation_worker:generate_in_cuts", world_size, payload):
        for cut in cuts:
            assert by_cut[cut] == reference_runs, cut


def test_eos_ends_a_response_unless_ignored(hf_dir: Path, tokenizer: Any, greedy: tuple[Sample, ...]) -> None:
    eos = greedy[0].response_ids[5]
    run = Run(REQUESTS, replace(GREEDY, ignore_eos=False), 3, eos=tokenizer.convert_ids_to_tokens(eos))
    ending, ignoring = run_here(hf_dir, run, replace(run, sampling=GREEDY))
    assert tokens(ignoring) == tokens(greedy)
    assert {sample.finish_reason for sample in ignoring} == {"length"}
    for full, sample in zip(greedy, ending, strict=True):
        expected = full.response_ids
        if eos in expected:
            expected = expected[: expected.index(eos) + 1]
        assert sample.response_ids == expected
        assert sample.finish_reason == ("eos" if eos in expected else "length")
        assert sample.text == tokenizer.decode([token for token in expected if token != eos])
    assert {sample.finish_reason for sample in ending} == {"eos", "length"}


def test_every_token_of_generation_config_ends_a_response(
    llama: Any, hf_dir: Path, tokenizer: Any, greedy: tuple[Sample, ...]
) -> None:
    ends = [tokenizer.eos_token_id, greedy[0].response_ids[5], greedy[2].response_ids[3]]
    run = Run(REQUESTS, replace(GREEDY, ignore_eos=False), 3, generation_eos_ids=tuple(ends))
    (samples,) = run_here(hf_dir, run)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": ends, "pad_token_id": 1}
    for request, sample in zip(REQUESTS, samples, strict=True):
        ids = torch.tensor([request.prompt.token_ids])
        with torch.no_grad():
            out = llama.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert sample.response_ids == tuple(out[0, ids.size(1) :].tolist())
        last = sample.response_ids[-1]
        assert sample.finish_reason == (f"eos:{tokenizer.decode([last])}" if last in ends else "length")
    assert {len(samples[index].response_ids) for index in (0, 2)} <= {6, 4, 5, 3, 2, 1}


def slow_stop(tokenizer: Any, response: Sequence[int], stop: tuple[str, ...]) -> tuple[int, str] | None:
    """Number of tokens and text of a response by decoding all of it after every token."""
    for count in range(1, len(response) + 1):
        text = tokenizer.decode(response[:count], skip_special_tokens=True)
        places = [text.find(string) for string in stop if string in text]
        if places:
            return count, text[: min(places)]
    return None


def test_stop_strings_stop(hf_dir: Path, tokenizer: Any, greedy: tuple[Sample, ...]) -> None:
    """One stop string is taken from the middle of two neighbouring tokens, so that neither holds it."""
    pieces = [tokenizer.decode([token]) for token in greedy[2].response_ids]
    spanning = next(
        pieces[place][-1] + pieces[place + 1][0]
        for place in range(8, NEW_TOKENS - 1)
        if "\ufffd" not in pieces[place] + pieces[place + 1]
        and slow_stop(tokenizer, greedy[2].response_ids[:place], (pieces[place][-1] + pieces[place + 1][0],)) is None
    )
    for stop in ((spanning,), (spanning, "zz", " t")):
        (stopped,) = run_here(hf_dir, Run(REQUESTS, replace(GREEDY, stop=stop), 3))
        for full, sample in zip(greedy, stopped, strict=True):
            expected = slow_stop(tokenizer, full.response_ids, stop)
            if expected is None:
                assert (sample.response_ids, sample.finish_reason) == (full.response_ids, "length")
                assert sample.text == full.text
            else:
                assert (len(sample.response_ids), sample.text) == expected
                assert sample.response_ids == full.response_ids[: expected[0]]
                assert sample.finish_reason.startswith("stop:") and sample.finish_reason[5:] in stop
        assert stopped[2].finish_reason == f"stop:{spanning}"


@pytest.mark.parametrize("special", [False, True])
def test_endings_equal_decoding_everything(tokenizer: Any, special: bool) -> None:
    """Text of many scripts cut into single bytes and larger pieces, with special tokens in between."""
    generator = random.Random(1)
    stops = [
        ("日本",),
        ("本 s",),
        ("🙃",),
        ("é\n",),
        ("\n\n", "Stop"),
        ("stop.", "go;"),
        (" ",),
        ("a", "ü"),
        ("no such text",),
    ]
    reached = 0
    for stop in stops:
        for _ in range(20):
            text = "".join(
                generator.choice(["日本", "語", "本 s", "🙂🙃", "é", "\n", "Stop", " stop.", "go;", " ", "ab", "über"])
                for _ in range(12)
            )
            response: list[int] = []
            for byte_piece in generator.sample([text, text.upper()], 2):
                response += tokenizer.encode(byte_piece)
                response += [0] * special  # EOS under ignore_eos
            ending = Ending(tokenizer, SamplingParams(len(response), stop=stop, ignore_eos=True))
            reasons = [ending.reason(response[:count]) for count in range(1, len(response) + 1)]
            found = next((count for count, reason in enumerate(reasons, 1) if reason and reason[:5] == "stop:"), None)
            expected = slow_stop(tokenizer, response, stop)
            assert found == (expected and expected[0])
            if expected:
                assert ending.text(response[: expected[0]], reasons[found - 1]) == expected[1]
                reached += 1
            else:
                assert reasons[-1] == "length"
                assert ending.text(response, "length") == tokenizer.decode(response, skip_special_tokens=True)
    assert reached > 60


def test_a_long_response_does_not_hold_up_the_queue() -> None:
    """Two slots, one endless sequence: the short ones all pass through the other slot."""
    requests = tuple(Request(Prompt((5,) * (9 if index == 0 else 3), ""), index) for index in range(9))
    ending = _Scripted({0: 40, **dict.fromkeys(range(1, 9), 5)})
    scheduler = Scheduler(requests, ending, num_slots=2)
    passes = 0
    while not scheduler.finished:
        work = scheduler.next_work(0)
        assert work is not None and 1 <= len(work.rows) <= 2
        scheduler.record(0, work, [row.request.sample_index for row in work.rows])
        passes += 1
    assert [len(sample.response_ids) for sample in scheduler.samples()] == [40, *[5] * 8]
    # 39 decoding steps after the first prefill of two; seven more prefills interrupt them
    assert passes == 1 + 39 + 7


@pytest.mark.parametrize(("num_slots", "num_groups"), [(7, 1), (7, 2), (8, 3), (2, 4)])
def test_slots_have_no_gaps_and_sequences_keep_their_caches(num_slots: int, num_groups: int) -> None:
    """A model of the cache: what a slot was filled with must be what the scheduler thinks sits there."""
    generator = random.Random(num_slots)
    requests = tuple(Request(Prompt((1,) * generator.randint(1, 9), ""), index) for index in range(40))
    lengths = {index: generator.randint(1, 30) for index in range(40)}
    scheduler = Scheduler(requests, _Scripted(lengths), num_slots, num_groups)
    assert sum(scheduler.group_sizes) == num_slots and len(scheduler.group_sizes) == num_groups
    caches: list[dict[int, list[int]]] = [{} for _ in range(num_groups)]
    under_way: list[Any] = [None] * num_groups
    turn = 0
    while not scheduler.finished:
        group = turn % num_groups
        cache = caches[group]
        if under_way[group] is not None:
            work = under_way[group]
            moves = scheduler.record(group, work, [row.request.sample_index for row in work.rows])
            assert not {source for source, _ in moves} & {target for _, target in moves}
            for source, target in moves:
                cache[target] = list(cache[source])
        work = under_way[group] = scheduler.next_work(group)
        if work is not None:
            assert work.first_slot + len(work.rows) <= scheduler.group_sizes[group]
            for slot, row in enumerate(work.rows, work.first_slot):
                if work.prefill:
                    cache[slot] = [row.request.sample_index] * len(row.context)
                else:
                    cache[slot].append(row.response[-1])
                assert cache[slot] == [row.request.sample_index] * row.length
        turn += 1
    assert [len(sample.response_ids) for sample in scheduler.samples()] == [lengths[index] for index in range(40)]


class _Scripted:
    """Ends the response of sample i, whose tokens are all i, after a given number of tokens."""

    def __init__(self, lengths: dict[int, int]) -> None:
        self.lengths = lengths

    def reason(self, response: Sequence[int]) -> str | None:
        return "length" if len(response) == self.lengths[response[-1]] else None

    def text(self, response: Sequence[int], reason: str) -> str:
        return ""


def test_a_full_refill_is_cut_to_bounded_prefills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_rlhf.generation.slots.PREFILL_TOKENS", 20)
    requests = tuple(Request(Prompt((1,) * length, ""), index) for index, length in enumerate([9, 30, 9, 4, 4, 4]))
    scheduler = Scheduler(requests, _Scripted(dict.fromkeys(range(6), 2)), num_slots=6)
    prefilled = []
    while (work := scheduler.next_work(0)) is not None and work.prefill:
        prefilled.append([len(row.context) for row in work.rows])
        scheduler.record(0, work, [row.request.sample_index for row in work.rows])
    assert prefilled == [[30], [9, 9], [4, 4, 4]]


def test_nothing_to_generate_gives_nothing(hf_dir: Path) -> None:
    assert run_here(hf_dir, Run((), SAMPLED, 4)) == [()]


def test_nan_weights_are_reported_on_every_stage(hf_dir: Path) -> None:
    payload = {"directory": hf_dir, "cut": (1, 2), "requests": REQUESTS}
    first, last = run_distributed("tests.workers.generation_worker:fail_on_nan", 2, payload)
    assert first == last
    assert len(first) == 8
    assert all("NaN logits after" in sentence for sentence in first)


def test_training_goes_on_after_generation(hf_dir: Path, tokenizer: Any) -> None:
    """Sequences as long as the cache was, recomputed layers: what generation left behind must be fit for autograd."""
    from nemo_rlhf.generation.engine import Engine

    state.set_environment_for_one_process()
    model = worker.load_model(hf_dir, 1, 1, recompute="full")
    engine = Engine(model, tokenizer, num_slots=2, max_sequence_length=64)
    ids = torch.randint(2, 281, (2, 64), generator=torch.Generator().manual_seed(0))
    selected = torch.arange(2, 128)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        hidden = model(ids, torch.arange(64).expand_as(ids))
        model.vocab_logprobs(hidden, ids, selected[selected % 64 > 0])[0].sum().backward()
        return model.decoder.layers[0].self_attention.linear_qkv.weight.grad.clone()

    before = gradient()
    model.rotary_pos_emb.forward.cache_clear()
    engine.generate(REQUESTS[:3], SamplingParams(20))
    after = gradient()
    assert before.abs().max() > 0
    assert torch.equal(before, after)


def test_bad_requests_get_one_sentence(hf_dir: Path, tokenizer: Any) -> None:
    from nemo_rlhf.generation.engine import Engine

    state.set_environment_for_one_process()
    model = worker.load_model(hf_dir, 1, 1)
    engine = Engine(model, tokenizer, num_slots=2, max_sequence_length=32)
    with pytest.raises(
        ValueError, match=r"prompt \"a b\" has 20 tokens.*max_new_tokens=13.*the 32 that a sequence may have"
    ):
        engine.generate([Request(Prompt((5,) * 20, "a b"), 3)], SamplingParams(13))
    with pytest.raises(ValueError, match="prompt of sample 4 has no tokens"):
        engine.generate([Request(Prompt((), ""), 4)], SamplingParams(2))
    with pytest.raises(ValueError, match="num_slots=0"):
        Engine(model, tokenizer, num_slots=0, max_sequence_length=32)
    with pytest.raises(ValueError, match="max_position_embeddings=128"):
        Engine(model, tokenizer, num_slots=1, max_sequence_length=129)
    (sample,) = engine.generate([Request(Prompt((5,) * 20, ""), 3)], SamplingParams(12, ignore_eos=True))
    assert len(sample.response_ids) == 12
