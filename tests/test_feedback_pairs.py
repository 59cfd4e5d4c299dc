"""What goes in and out of the preference store: pairs as files, agreement, scripted annotators, the program."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from sqlalchemy import text

from nemo_rlhf.cli import main
from nemo_rlhf.config.feedback import SimulateConfig
from nemo_rlhf.data.pairs import read_pairs
from nemo_rlhf.data.tokenizer import load_tokenizer
from nemo_rlhf.feedback.accounts import sign_in, without_access
from nemo_rlhf.feedback.agreement import alpha
from nemo_rlhf.feedback.desk import Desk
from nemo_rlhf.feedback.exchange import export_file, export_records, import_pairs
from nemo_rlhf.feedback.given import read_pair
from nemo_rlhf.feedback.records import MAX_TEXT, VERDICTS, NewTask, Vote
from nemo_rlhf.feedback.simulate import SimulatedAnnotators
from nemo_rlhf.feedback.store import Store, run_name
from nemo_rlhf.files import alone
from tests.conftest import Tiny
from tests.feedback import say, tasks, verdicts
from tests.jobs import Job
from tests.workers.feedback_worker import longer

pytestmark = pytest.mark.usefixtures("outside_of_any_job")

# -- pairs in and out -------------------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def take_in(store: Store, run_id: int, records: list[tuple[str, Any]]) -> tuple[int, int]:
    return import_pairs(store, run_id, [read_pair(where, record) for where, record in records])


def compared(store: Store, name: str = "run") -> int:
    """A run with every kind of comparison, and what is no pair."""
    run_id = store.run(name, create=True, answers_wanted=2)
    new = [
        NewTask("plain", "abc", ("yes", "no")),
        NewTask("chat", "system: be brief\n\nuser: hello", ("hi", "go away"), metadata={"messages": CHAT}),
        NewTask("margin", "abc", ("dear", "me"), metadata={"margin": 0.5, "sample": 3}),
        NewTask("empty", "abc", ("", "x")),
        NewTask("equal", "abc", ("x", "x")),
    ]
    store.add_tasks(run_id, 7, new)
    ann = Desk(store, run_id, without_access(store, run_id, "ann", simulated=False))
    robot = Desk(store, run_id, without_access(store, run_id, "robot", simulated=True))
    for desk, said in ((ann, ["first", "second", "first", "first", "first"]), (robot, ["second", "tie", "both_bad"])):
        for verdict in said:
            say(desk, verdict)
    return run_id


def pairs_of(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(r["prompt"], r["chosen"], r["rejected"], r["annotator"], r["simulated"]) for r in records]


def test_pairs_out(file_store: Store) -> None:
    run_id = compared(file_store)
    records = list(export_records(file_store, run_id, "pairs"))
    assert pairs_of(records) == [
        ("abc", "yes", "no", "ann", False),
        (CHAT, "go away", "hi", "ann", False),
        ("abc", "dear", "me", "ann", False),
        ("abc", "no", "yes", "robot", True),
    ]
    assert [record["margin"] for record in records] == [0.0, 0.0, 0.5, 0.0]
    chats = list(export_records(file_store, run_id, "conversational"))
    assert chats[1]["chosen"] == [*CHAT, {"role": "assistant", "content": "go away"}]
    assert chats[0]["rejected"] == [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "no"}]
    assert all("prompt" not in record and record["step"] == 7 for record in chats)
    assert exports(file_store) == [("pairs", 4, 8), ("conversational", 4, 8)]


def test_pairs_round_trip(store: Store, tmp_path: Path, tiny: Tiny) -> None:
    """What was exported is read by the reward model's reader, by ``datasets``, and by another run, which then exports
    the same; and importing twice adds nothing."""
    run_id = compared(store)
    original = list(export_records(store, run_id, "pairs"))
    for number, form in enumerate(("pairs", "conversational")):
        file = tmp_path / f"{form}.jsonl"
        assert export_file(store, run_id, form, file) == 4
        lines = [(f"line {i}", json.loads(line)) for i, line in enumerate(file.read_text().splitlines())]
        other = store.run(f"other {number}", create=True)
        assert take_in(store, other, lines) == (4, 0)
        assert take_in(store, other, lines) == (0, 4)
        again = list(export_records(store, other, "pairs"))
        if form == "conversational":  # the plain prompts have become chats
            again = [
                {**r, "prompt": "abc" if r["prompt"] == [{"role": "user", "content": "abc"}] else r["prompt"]}
                for r in again
            ]
        assert again == original
        assert store.queue_length(other) == 0 and len(store.settled_ids(other)) == 4
        assert take_in(store, run_id, lines) == (0, 4), "its own"
    assert export_file(store, run_id, "conversational", tmp_path / "set") == 4
    rows = datasets.load_from_disk(str(tmp_path / "set"))
    assert [dict(row) for row in rows] == list(export_records(store, run_id, "conversational"))
    with pytest.raises(ValueError, match="use --form conversational"):
        export_file(store, run_id, "pairs", tmp_path / "mixed")
    plain = [r for r in original if isinstance(r["prompt"], str)]
    read = read_pairs(plain, load_tokenizer(str(tiny.hf)), 64)
    assert [(pair.margin, pair.chosen == read[-1].rejected) for pair in read] == [
        (0.0, True),
        (0.5, False),
        (0.0, False),
    ]
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"


def test_an_answer_that_is_taken_back_during_an_export(file_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = file_store.run("run", create=True)
    file_store.add_tasks(run_id, 1, tasks(4))
    ann = Desk(file_store, run_id, without_access(file_store, run_id, "ann", simulated=False))
    for _ in range(3):
        say(ann, "first")
    monkeypatch.setattr("nemo_rlhf.feedback.exchange._AT_ONCE", 1)
    records = export_records(file_store, run_id, "pairs")
    keys = [next(records)["key"]]
    assert ann.undo()[0]
    say(ann, "second")
    keys += [record["key"] for record in records]
    assert keys == ["task-0", "task-1"], "as they stood, but for the last one"
    assert exports(file_store) == [("pairs", 2, 2)]


def exports(store: Store) -> list[tuple[str, int, int]]:
    with store.database.read() as connection:
        logged = connection.execute(text("SELECT form, pairs, last_comparison FROM exports ORDER BY id")).all()
    return [(row[0], row[1], row[2]) for row in logged]


def test_what_an_export_replaces(file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set, once the new one is whole; nothing else; and only what has come about is noted."""
    run_id, out = file_store.run("run", create=True), tmp_path / "set"
    with pytest.raises(ValueError, match="nothing to export"):
        export_file(file_store, run_id, "pairs", out)
    run_id = compared(file_store)
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "metrics.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="ppo holds something else than a data set, which is not replaced"):
        export_file(file_store, run_id, "conversational", tmp_path / "ppo", force=True)
    assert (tmp_path / "ppo" / "metrics.jsonl").is_file() and exports(file_store) == []
    for _ in range(2):
        export_file(file_store, run_id, "conversational", out, force=True)
    before = exports(file_store)
    assert before == [("conversational", 4, 8)] * 2
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space left"):
        export_file(file_store, run_id, "conversational", out, force=True)
    assert len(datasets.load_from_disk(str(out))) == 4 and exports(file_store) == before
    assert not list(tmp_path.glob(".*"))


def test_two_do_not_write_one_export(file_store: Store, tmp_path: Path) -> None:
    run_id = compared(file_store)
    for name in ("set", "pairs.jsonl"):
        out = tmp_path / name
        with alone(out), pytest.raises(ValueError, match=f"{name} is being written by another process"):
            export_file(file_store, run_id, "conversational", out)
        assert export_file(file_store, run_id, "conversational", out) == 4
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["notes.txt", "src/thesis.tex", ".git/HEAD", "data-of-mine.arrow"])
def test_an_export_never_replaces_what_is_beside_a_data_set(name: str, file_store: Store, tmp_path: Path) -> None:
    run_id, out = compared(file_store), tmp_path / "set"
    export_file(file_store, run_id, "conversational", out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("years of work")
    with pytest.raises(ValueError, match="beside a data set, which is not replaced"):
        export_file(file_store, run_id, "conversational", out, force=True)
    assert (out / name).read_text() == "years of work"


def test_an_export_replaces_no_link_and_not_where_it_runs(
    file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, out = compared(file_store), tmp_path / "set"
    export_file(file_store, run_id, "conversational", out)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ValueError, match="is a link to"):
        export_file(file_store, run_id, "conversational", tmp_path / "link", force=True)
    monkeypatch.chdir(out)
    with pytest.raises(ValueError, match="is where this command runs"):
        export_file(file_store, run_id, "conversational", out, force=True)


def test_one_annotator_says_one_thing(store: Store) -> None:
    run_id = store.run("run", create=True)
    one, other = {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "b", "rejected": "a"}
    with pytest.raises(ValueError, match=r'^line 3 contradicts line 1, where import said something else.*"annotator"'):
        take_in(store, run_id, [("line 1", one), ("line 2", one), ("line 3", other)])
    assert store.comparison_ids(run_id) == [], "all or none"
    assert take_in(store, run_id, [("line 1", one), ("line 2", one), ("line 3", {**other, "annotator": "ann"})]) == (
        2,
        1,
    )
    with pytest.raises(ValueError, match=r"^line 1 contradicts the store, where ann said something else"):
        take_in(store, run_id, [("line 1", {**one, "annotator": "ann"})])


def test_one_task_however_many_compared_it(store: Store) -> None:
    run_id = store.run("run", create=True)
    prompt = [{"role": "user", "content": "p"}]
    given = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "annotator": "ann", "seconds": 3, "note": "n"},
        {"prompt": "p", "chosen": "b", "rejected": "a", "annotator": "ben"},
        {"prompt": prompt, "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}], "annotator": "cem"},
        {"prompt": "p", "chosen": "a", "rejected": "c"},
    ]
    assert take_in(store, run_id, [(f"{i}", one) for i, one in enumerate(given)]) == (4, 0)
    found = store.comparisons(store.comparison_ids(run_id))
    assert [(one.annotator, one.verdict, one.answers) for one in found] == [
        ("ann", "first", ("a", "b")),
        ("ben", "second", ("a", "b")),
        ("cem", "first", ("a", "b")),
        ("import", "first", ("a", "c")),
    ]
    assert len({one.task_id for one in found}) == 2 and {one.step for one in found} == {-1}
    assert (found[0].seconds, found[0].note) == (3.0, "n")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("text", "is a str"),
        ({"prompt": "p", "chosen": "a"}, 'no field "rejected"'),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "same text"),
        ({"prompt": "p", "chosen": "", "rejected": "a"}, "chosen is empty"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt is a int"),
        ({"chosen": "a", "rejected": "b"}, "chosen is a str, and must be text or a list"),
        ({"chosen": CHAT, "rejected": [*CHAT, CHAT[0]]}, "differ in the last reply"),
        ({"chosen": CHAT, "rejected": [CHAT[0], {"role": "user", "content": "x"}]}, "one message of the assistant"),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "a message of prompt"),
        ({"prompt": "p", "chosen": "a" * (MAX_TEXT + 1), "rejected": "b"}, "chosen has 100001"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "step": 1.5}, "step is 1.5"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "seconds": -1}, "seconds is -1"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "annotator": "a\nb"}, "the name of an annotator|The name"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "annotator": "robot"}, "robot is simulated"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "key": "plain"}, "task plain has other texts"),
    ],
)
def test_pairs_that_are_refused(record: Any, says: str, file_store: Store) -> None:
    run_id = compared(file_store)
    before = file_store.comparison_ids(run_id)
    good = {"prompt": "good", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=says) as error:
        take_in(file_store, run_id, [("pairs.jsonl, line 1", good), ("pairs.jsonl, line 2", record)])
    assert str(error.value).startswith("pairs.jsonl, line 2")
    assert file_store.comparison_ids(run_id) == before, "all or none"


# -- agreement, simulated annotators, the program ---------------------------------------------------------------------


def votes(*tasks: str) -> list[Vote]:
    """Each task is a string with a letter an annotator: f, s, t, b, or a blank for none."""
    names = dict(zip("fstb", VERDICTS, strict=True))
    return [
        Vote(task, annotator, names[letter], simulated=False)
        for task, letters in enumerate(tasks)
        for annotator, letter in enumerate(letters)
        if letter != " "
    ]


def alpha_by_hand(given: list[Vote]) -> float:
    """From the definition: 1 minus observed over expected disagreement of pairable values."""
    units: dict[int, list[str]] = {}
    for vote in given:
        units.setdefault(vote.task_id, []).append(vote.verdict)
    units = {task: values for task, values in units.items() if len(values) > 1}
    values = [value for unit in units.values() for value in unit]
    observed = sum(
        sum(a != b for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j) / (len(unit) - 1)
        for unit in units.values()
    ) / len(values)
    expected = sum(a != b for i, a in enumerate(values) for j, b in enumerate(values) if i != j)
    return 1 - observed / (expected / (len(values) * (len(values) - 1)))


def test_alpha() -> None:
    # 8 values, 3 of them "first": observed 2/8, expected 2*3*5/(8*7), alpha = 1 - 0.25 * 56 / 30
    assert alpha(votes("ff", "fs", "ss", "ss")) == pytest.approx(8 / 15)
    many = votes("ffs", "f t", "bbb", " ss", "s  ", "tft", "bfb", "sss")
    assert alpha(many) == pytest.approx(alpha_by_hand(many))
    assert alpha(votes("fs", "sf")) == pytest.approx(alpha_by_hand(votes("fs", "sf"))) and alpha(votes("ff", "ss")) == 1
    assert alpha([]) is None and alpha(votes("f", "s")) is None and alpha(votes("ff", "ff", "s")) is None


def simulated(store: Store, name: str, new: list[NewTask], **settings: Any) -> dict[tuple[str, str], str]:
    run_id = store.run(name, create=True, answers_wanted=settings.get("annotators", 1))
    store.add_tasks(run_id, 1, new)
    annotators = SimulatedAnnotators(store, run_id, longer, SimulateConfig(**settings))
    while annotators.answer_each():
        pass
    assert all(one.simulated for one in store.comparisons(store.comparison_ids(run_id)))
    return verdicts(store, run_id)


def test_simulated_annotators(file_store: Store) -> None:
    new = [NewTask(f"{i}", "p", ("short", "longer one") if i % 2 else ("longer one", "short")) for i in range(100)]
    right = {task.key: "second" if int(task.key) % 2 else "first" for task in new}
    exact = simulated(file_store, "exact", new[:20], noise=0.0)
    assert exact == {("simulated-1", key): right[key] for key in list(right)[:20]}
    noisy = simulated(file_store, "noisy", new, noise=0.1, annotators=2)
    wrong = {who for who, verdict in noisy.items() if verdict != right[who[1]]}
    assert len(noisy) == 200 and 8 <= len(wrong) <= 32, "0.1 of 200, within three deviations"
    assert {who[0] for who in wrong} == {"simulated-1", "simulated-2"}
    again = simulated(file_store, "again", new[::-1], noise=0.1, annotators=2)
    assert again == noisy, "whatever the order, and however the answers were shown"
    assert simulated(file_store, "other", new[:30], noise=0.1, seed=1) != simulated(
        file_store, "one", new[:30], noise=0.1
    )
    even = [NewTask(f"{i}", "p", ("same", "size")) for i in range(30)]
    assert set(simulated(file_store, "even", even, noise=0.0).values()) == {"tie"}
    assert set(simulated(file_store, "coin", even, noise=1.0).values()) == {"first", "second"}


def test_a_function_that_gives_no_number(file_store: Store) -> None:
    run_id = file_store.run("run", create=True)
    file_store.add_tasks(run_id, 1, tasks(1))
    for value in (None, "high", math.nan, math.inf):
        wrong: Callable[[str, str], Any] = lambda prompt, answer, value=value: value  # type: ignore[misc] # noqa: E731
        with pytest.raises(ValueError, match="no number"):
            SimulatedAnnotators(file_store, run_id, wrong, SimulateConfig()).answer_each()


def run_main(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["feedback", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    where = ["--store", "feedback.db", "--run", "runs/ppo"]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    assert run_main(capsys, "export", *where, "out.jsonl")[0] == 2, "there is no run yet"
    (tmp_path / "wrong.jsonl").write_text(pairs.read_text() + "{}\n")
    assert run_main(capsys, "import", *where, "wrong.jsonl")[0] == 2
    assert "it has none yet" in run_main(capsys, "invite", *where, "ann")[2]
    assert run_main(capsys, "import", *where, "pairs.jsonl") == (0, "1 new pairs\n", "")
    assert run_main(capsys, "import", *where, "pairs.jsonl")[1] == "0 new pairs, 1 were there already\n"
    code, out, _ = run_main(capsys, "invite", *where, "ann", "--admin")
    store = Store.open("feedback.db")
    run_id = store.run(str(tmp_path.resolve() / "runs" / "ppo"))
    account = sign_in(store, run_id, out.strip())
    assert code == 0 and account is not None and account.is_admin
    assert run_main(capsys, "invite", *where, "ann", "--revoke")[:2] == (0, "ann has no access any more.\n")
    assert run_main(capsys, "invite", "--store", "feedback.db", "--run", "named", "ann")[0] == 2
    store.run("named", create=True)
    assert run_main(capsys, "invite", "--store", "feedback.db", "--run", "named", "ann")[0] == 0, "a name, no directory"
    store.add_tasks(run_id, 3, tasks(5))
    prefer = ["--prefer", "tests.workers.feedback_worker:longer", "--noise", "1"]
    assert run_main(capsys, "simulate", *where, *prefer, "--annotators", "2") == (0, "5 simulated comparisons\n", "")
    assert run_main(capsys, "export", *where, "out.jsonl")[1].startswith("6 pairs of 6 comparisons in out.jsonl")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 6
    for arguments, says in [
        (["export", *where, "out.jsonl"], "is there already"),
        (["export", *where, "out.csv"], "neither"),
        (["export", *where, "no/out.jsonl"], "no directory"),
        (["import", *where, "none.jsonl"], "no file none.jsonl"),
        (["simulate", *where, "--prefer", "tests.nothing:f"], "--prefer"),
        (["simulate", *where, *prefer[:2], "--noise", "2"], "--noise 2.0"),
        (["simulate", *where, *prefer[:2], "--annotators", "0"], "--annotators 0"),
        (["simulate", "--store", "feedback.db", "--run", "typo", *prefer], "has no run"),
        (["export", "--store", "mysql://x/y", "--run", "r", "o.jsonl"], "postgresql://"),
    ]:
        code, out, err = run_main(capsys, *arguments)
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1, err
    assert run_main(capsys, "export", *where, "out.jsonl", "--force")[0] == 0
    store.close()


def test_simulate_waits_for_tasks_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """It may be there before the run is, and answers what the run adds."""
    where = ["--store", str(tmp_path / "feedback.db"), "--run", str(tmp_path / "run")]
    job = Job(["feedback", "simulate", *where, "--prefer", "tests.workers.feedback_worker:longer", "--watch"], tmp_path)
    job.wait_until((tmp_path / "feedback.db").exists, 60)
    store = Store.open(str(tmp_path / "feedback.db"))
    run_id = store.run(run_name(tmp_path / "run"), create=True, undo_s=0)
    for num in (3, 6):
        store.add_tasks(run_id, 1, tasks(num))
        job.wait_until(lambda num=num: len(store.settled_ids(run_id)) == num, 60)  # type: ignore[misc]
    job.process.terminate()
    assert job.wait(30) == 75 and job.stdout == "6 simulated comparisons\n"
    store.close()
