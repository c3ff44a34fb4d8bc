"""Configs, dialogues, runs on the built-in model, their files, and what is read back."""

import json
import time
from dataclasses import replace

import pytest
import torch

from broadsheet.methods.estimates.melt import MELT, read_report
from broadsheet.methods.estimates.melt.clock import Clock, check_clocks
from broadsheet.methods.estimates.melt.config import (
    ModelConfig,
    Prompt,
    RunSettings,
    Sampling,
    llama_flags,
    mlc_settings,
    read_config,
)
from broadsheet.methods.estimates.melt.conversations import draw_conversations, microworld_starters
from broadsheet.methods.estimates.melt.dialogue import Dialogue, Sampler
from broadsheet.methods.estimates.melt.meters import Meter, meter, nvml, rapl, read_csv
from broadsheet.methods.estimates.melt.metrics import PowerTrace
from broadsheet.methods.estimates.melt.records import read_run, write_power
from broadsheet.methods.estimates.melt.report import SIMULATED, as_csv, markdown
from broadsheet.methods.estimates.melt.runtimes import TorchRuntime
from broadsheet.methods.estimates.melt.session import run_session

QUICK = RunSettings(context=512, max_gen=6, repetitions=2, conversations=2, warmup=0, idle=0.05, tail=0.05, max_busy=1.0)
GREEDY = ModelConfig("pocket-2m", sampling=Sampling(temperature=0))
CONVERSATIONS = [one[:3] for one in draw_conversations(microworld_starters(30), 2)]
EXAMPLE = """---

model: mistral-7b-instruct-v0.1
url: https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.1
sampling:
  temperature: 0.7
  repetition_penalty: 1.0
  top_p: 0.95
  top_k: 40  # Applicable to llama.cpp only
  repeat_last_n: 64
  n_batch: 512
generation:
  mean_gen_len: 128
  max_gen_len: 16384
  max_window_size: 16384
  vocab_size: 32000
prompt:
  conv_template: "mistral_default"
  text: "\\"<s>Always assist with care.\\\\n\\""
  in_prefix: "\\"[INST]\\""
  in_suffix: "\\"[/INST]\\""
  reverse: "\\"[INST]\\""
"""


def torch_runtime(settings=QUICK, form="fp32", config=GREEDY):
    return TorchRuntime("pocket-2m", form, config, settings, Clock())


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run with the power of a model of a phone."""
    folder = tmp_path_factory.mktemp("run")
    return run_session(torch_runtime(), CONVERSATIONS, meter("model:galaxy-s23"), folder)


# --- configs ----------------------------------------------------------------------------------------------------------


def test_the_public_yaml(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(EXAMPLE)
    config = read_config(path)
    assert config.model == "mistral-7b-instruct-v0.1"
    assert config.generation.max_gen_len == 16384
    assert config.prompt.plain.in_prefix == "[INST]"
    assert config.prompt.plain.text == "<s>Always assist with care.\n"
    config.write(tmp_path / "again.yaml")
    assert read_config(tmp_path / "again.yaml") == config
    flags = llama_flags(config, RunSettings(context=1024, max_gen=32, ignore_eos=True))
    assert flags[flags.index("-c") + 1] == "1024"
    assert flags[flags.index("--in-prefix") + 1] == "[INST]"
    assert flags[-1] == "--ignore-eos"
    assert mlc_settings(config, RunSettings())["context_window_size"] == 2048
    assert mlc_settings(config, RunSettings())["conv_template"] == "mistral_default"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("url: x", "names no model"),
        ("model: m\nsampling: {temperatur: 1}", "sampling has no 'temperatur'"),
        ("model: m\nsampling: {top_k: many}", "sampling.top_k must be int"),
        ("model: m\nsampling: {top_p: 1.5}", r"top_p in \(0, 1\]"),
        ("model: m\ncolour: red", "unknown fields colour"),
        ("model: [", "is not YAML"),
    ],
)
def test_bad_configs_name_the_field(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


# --- dialogue and sampling --------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_whole_rendered_chat():
    from broadsheet.core.models import load

    _, tokenizer = load("pocket-2m")
    dialogue = Dialogue.of(tokenizer)
    reply = tokenizer(" tuvo.", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = dialogue.opening("Give zega tuvo.") + reply
    ids += dialogue.following("Where is it?", reply[-1])
    chat = [
        {"role": "user", "content": "Give zega tuvo."},
        {"role": "assistant", "content": "tuvo."},
        {"role": "user", "content": "Where is it?"},
    ]
    whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids == list(whole)


def test_a_configs_own_prompt_goes_before_the_template():
    words = Dialogue(lambda text: [ord(c) for c in text], lambda messages: "template", Prompt("", "S", "<", ">", ""), [0])
    assert words.opening("hi") == [0, *map(ord, "S<hi>")]
    assert words.following("so") == [*map(ord, "<so>")]


def test_sampler_follows_its_settings():
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0])
    assert Sampler(Sampling(temperature=0), 0).draw(logits, []) == 0
    assert Sampler(Sampling(temperature=0, repetition_penalty=3.0), 0).draw(logits, [0]) == 1  # 2 / 3 < 1
    assert Sampler(Sampling(temperature=0), 0, banned=[0]).draw(logits, []) == 1
    assert {Sampler(Sampling(top_k=1), key).draw(logits, []) for key in range(20)} == {0}
    draws = [Sampler(Sampling(temperature=1.0, top_p=1.0, top_k=0), key).draw(logits, []) for key in range(600)]
    share = draws.count(0) / 600
    wanted = float(logits.softmax(0)[0])
    assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / 600) ** 0.5
    assert Sampler(Sampling(), 7).draw(logits, []) == Sampler(Sampling(), 7).draw(logits, [])


# --- runs -------------------------------------------------------------------------------------------------------------


def test_prefill_decode_and_overhead_make_the_turn(ran):
    assert len(ran.turns) == 2 * sum(map(len, CONVERSATIONS))
    for turn in ran.turns:
        assert turn.unaccounted < 0.02
        assert turn.whole.start <= turn.prefill.start <= turn.prefill.end <= turn.decode.start <= turn.decode.end
        assert turn.decode.start <= turn.first_token <= turn.decode.end
        assert 1 <= turn.output_tokens <= QUICK.max_gen


def test_token_counts_are_the_tokenizers(ran):
    from broadsheet.core.models import load

    _, tokenizer = load("pocket-2m")
    rows = json.loads((ran.folder / "melt_measurements" / "measurements_iter0.json").read_text())
    for row in rows:
        held, chat = 0, []
        for record in row["questionRecords"]:
            chat.append({"role": "user", "content": record["question"]})
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            assert record["original_session_tokens"] == held
            assert held + record["input_tokens"] == len(tokenizer(text, add_special_tokens=False)["input_ids"])
            held += record["input_tokens"] + record["output_tokens"]
            chat.append({"role": "assistant", "content": record["answer"].strip()})


def test_repetitions_give_the_same_replies(ran):
    first, second = (
        json.loads((ran.folder / "melt_measurements" / f"measurements_iter{i}.json").read_text()) for i in (0, 1)
    )
    for a, b in zip(first, second, strict=True):
        assert [r["answer"] for r in a["questionRecords"]] == [r["answer"] for r in b["questionRecords"]]


def test_without_the_prefix_cache_all_is_prefilled_again_and_the_reply_is_the_same(ran, tmp_path):
    again = run_session(torch_runtime(replace(QUICK, keep_cache=False, repetitions=1)), CONVERSATIONS, Meter(), tmp_path)
    kept = [turn for turn in ran.turns if turn.iteration == 0]
    for turn, other in zip(kept, again.turns, strict=True):
        assert other.session_tokens == 0
        assert other.input_tokens == turn.session_tokens + turn.input_tokens
        assert other.output_tokens == turn.output_tokens
    assert again.trace is None
    assert again.energies() == [None] * len(again.turns)


def test_fixed_lengths_and_a_full_context(tmp_path):
    settings = replace(QUICK, ignore_eos=True, repetitions=1, context=160, max_gen=20)
    run = run_session(torch_runtime(settings), CONVERSATIONS, Meter(), tmp_path)
    assert {turn.output_tokens for turn in run.turns} == {20}
    assert any(turn.prompt and not turn.session_tokens for turn in run.turns)  # it began anew
    assert all(turn.session_tokens + turn.input_tokens + turn.output_tokens <= 160 for turn in run.turns)


def test_a_prompt_that_does_not_fit_says_which_turn(tmp_path):
    settings = replace(QUICK, context=40, max_gen=6)
    with pytest.raises(
        ValueError, match=r"conversation 0, turn 1: a prompt of \d+ tokens leaves no room for a reply of 1 .* context of 40"
    ):
        run_session(torch_runtime(settings), [("How are you?", " ".join(["tuvo"] * 60))], Meter(), tmp_path)
    with pytest.raises(ValueError, match="beyond the 4608 positions of pocket-2m"):
        torch_runtime(replace(QUICK, context=5000)).load()
    with pytest.raises(ValueError, match="torch has no format 'q9'; it has fp32"):
        torch_runtime(form="q9")


def test_a_model_that_does_not_load_says_why(tmp_path):
    runtime = TorchRuntime(str(tmp_path / "none"), "fp32", GREEDY, QUICK, Clock())
    with pytest.raises(ValueError, match="no model '"):
        run_session(runtime, CONVERSATIONS, Meter(), tmp_path / "run")


@pytest.mark.parametrize("form", ["bf16", "int8", "int2"])
def test_formats_hold_fewer_bytes(form):
    full, small = torch_runtime(), torch_runtime(form=form)
    full.load()
    small.load()
    assert small.nbytes < full.nbytes
    small.begin(0)
    assert small.answer("Give zega tuvo. What do you give zega?").output_tokens >= 1


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    class Killed(TorchRuntime):
        def answer(self, prompt):
            if self.loads == 2 and self.turn == 1:
                raise KeyboardInterrupt
            return super().answer(prompt)

        def load(self):
            self.loads = getattr(self, "loads", 0) + 1
            return super().load()

    with pytest.raises(KeyboardInterrupt):
        run_session(Killed("pocket-2m", "fp32", GREEDY, QUICK, Clock()), CONVERSATIONS, Meter(), tmp_path)
    runtime = torch_runtime()
    run = run_session(runtime, CONVERSATIONS, Meter(), tmp_path)
    assert {turn.iteration for turn in run.turns} == {0, 1}
    assert "1 iterations are here" in (tmp_path / "output.txt").read_text()  # the first was kept
    with pytest.raises(ValueError, match=r"holds another run \(its format differ\)"):
        run_session(torch_runtime(form="int8"), CONVERSATIONS, Meter(), tmp_path)


def test_a_sustained_run_goes_on_until_its_time_is_over(tmp_path, monkeypatch):
    later = [0.0]
    clock = Clock(lambda: time.time() + later[0])

    def heat():  # called after every iteration, which takes 400 s by this clock
        later[0] += 400
        clock._began += 400
        return 40.0 + later[0] / 100

    monkeypatch.setattr("broadsheet.methods.estimates.melt.machine.temperature", heat)
    settings = replace(QUICK, sustain=1000.0, conversations=1, repetitions=1)
    run = run_session(TorchRuntime("pocket-2m", "fp32", GREEDY, settings, clock), CONVERSATIONS, Meter(), tmp_path)
    assert {turn.iteration for turn in run.turns} == {0, 1, 2}  # the third began at 800 s
    table = read_report([tmp_path]).sustained().records()
    assert table[0]["of the first"] == "100 %"
    assert len({row["minute"] for row in table}) >= 3
    assert sum(row["turns"] for row in table) == len(run.turns)


def test_a_busy_machine_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("broadsheet.methods.estimates.melt.machine.busy", lambda seconds=1.0: 0.6)
    with pytest.raises(ValueError, match="other processes take 60 % of the CPUs"):
        run_session(torch_runtime(replace(QUICK, max_busy=0.1)), CONVERSATIONS, Meter(), tmp_path)
    run = run_session(torch_runtime(replace(QUICK, repetitions=1)), CONVERSATIONS[:1], Meter(), tmp_path)
    assert "took 60 % of the CPUs" in read_report([run.folder]).summary().note


# --- records and reports ----------------------------------------------------------------------------------------------


def test_the_folder_has_the_authors_files(ran):
    names = {path.relative_to(ran.folder).as_posix() for path in ran.folder.rglob("*") if path.is_file()}
    where = "melt_measurements/measurements_iter"
    assert names == {
        "configuration.json", "output.txt", "measurements_power.csv", "measurements_ts.csv",
        *(f"{where}{i}.json" for i in (0, 1)), *(f"{where}{i}_conv{j}.csv" for i in (0, 1) for j in (0, 1)),
    }  # fmt: skip
    events = (ran.folder / f"{where}0_conv0.csv").read_text().splitlines()
    assert events[0].startswith("load_model.start,")
    assert events[2].startswith("prefill.0.start,")
    assert abs(int(events[2].split(",")[1]) / 1e9 - ran.turns[0].prefill.start) < 1e-6


def test_every_simulated_number_says_so(ran):
    report = read_report([ran.folder])
    energy = report.energy()
    assert energy.rows
    for table in (energy, report.turns()):
        for row in table.records():
            for name, value in row.items():
                if value is not None and ("mWh" in name or "mAh" in name or "mW" in name):
                    assert str(value).endswith(SIMULATED), (table.title, name, value)
    assert SIMULATED in report.files()["report.md"]
    assert report.to_json()["runs"][0]["power"]["simulated"] is True


def test_work_that_cannot_be_counted_is_refused_before_the_run(tmp_path):
    class Named(TorchRuntime):
        formats = (*TorchRuntime.formats, "odd")

    runtime = Named("pocket-2m", "odd", GREEDY, QUICK, Clock())
    with pytest.raises(ValueError, match="unknown quantisation 'odd'"):
        run_session(runtime, CONVERSATIONS, meter("model:pixel-6a"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_measured_energy_carries_no_tag(ran, tmp_path):
    import shutil

    folder = shutil.copytree(ran.folder, tmp_path / "copy")
    stages = ran.stages
    times = [stages[0].window.start - 1, stages[-1].window.end + 1]
    write_power(folder, PowerTrace.of_samples(times, [500.0, 500.0], [4.0, 4.0]))
    row = json.loads((folder / "configuration.json").read_text())
    (folder / "configuration.json").write_text(json.dumps({**row, "meter": {"source": "monsoon", "simulated": False}}))
    run = read_run(folder)
    assert run.idle_power == pytest.approx(2000)
    turn, energy = run.turns[0], run.energies()[0]
    assert energy.total == pytest.approx(2000 * turn.whole.seconds / 3600, rel=1e-6)
    assert energy.net == pytest.approx(0, abs=1e-9)
    assert SIMULATED not in markdown(read_report([folder]).energy())


def test_the_authors_own_folders_are_read(tmp_path):
    """A Monsoon's file without a header, starts as dates, records by their other name."""
    where = tmp_path / "melt_measurements"
    where.mkdir()
    (tmp_path / "configuration.json").write_text('{"device": "Galaxy S23", "app": "MLCChat", "model": "m"}')
    start = 1707145758.386
    turn = {
        "time": {"start": "2024-02-05T15:09:18.386Z", "duration": 4.0}, "input_tokens": 30, "output_tokens": 10,
        "original_session_tokens": 0, "runtimeStats": "",
    }  # fmt: skip
    row = {"modelLoadTime": {"start": start - 5, "duration": 2.0}, "chatRecords": [turn]}
    (where / "measurements_iter0.json").write_text(json.dumps([row]))
    nano = [round(1e9 * (start + offset)) for offset in (0.5, 1.5, 1.5, 3.5)]
    names = ("prefill.0.start", "prefill.0.end", "generate.0.start", "generate.0.end")
    (where / "measurements_iter0_conv0.csv").write_text("".join(f"{n},{t}\n" for n, t in zip(names, nano, strict=True)))
    (tmp_path / ".t_monsoon").write_text(str(start - 10))
    (tmp_path / "measurements_monsoon.csv").write_text("".join(f"{i / 10:.1f},900.0,4.0,\n" for i in range(200)))
    run = read_run(tmp_path)
    assert run.turns[0].prefill_tps == pytest.approx(30, rel=1e-6)
    assert run.turns[0].decode_tps == pytest.approx(5, rel=1e-6)
    assert run.energies()[0].total == pytest.approx(4.0, rel=1e-6)
    assert run.energies()[0].per_token == pytest.approx(0.4, rel=1e-6)
    (tmp_path / "measurements_monsoon.csv").write_text("".join(f"{i / 10:.1f},900.0,4.0,\n" for i in range(120)))
    with pytest.raises(ValueError, match="monsoon covers"):
        read_run(tmp_path).energies()


def test_damaged_folders_say_what_is_wrong(tmp_path, ran):
    import shutil

    with pytest.raises(ValueError, match=r"there is no configuration\.json"):
        read_run(tmp_path)
    folder = shutil.copytree(ran.folder, tmp_path / "copy")
    events = folder / "melt_measurements" / "measurements_iter0_conv0.csv"
    events.write_text("\n".join(events.read_text().splitlines()[:4]) + "\n")
    with pytest.raises(ValueError, match=r"the events have no generate\.0"):
        read_run(folder)
    events.unlink()
    with pytest.raises(ValueError, match="is missing: without its events"):
        read_run(folder)
    (folder / "melt_measurements" / "measurements_iter0.json").write_text('[{"modelLoadTime": 3}]')
    with pytest.raises(ValueError, match="is no file of measurements"):
        read_run(folder)


def test_exports(ran):
    files = read_report([ran.folder]).files()
    rows = json.loads(files["llama-bench.json"])
    assert [(row["n_prompt"] > 0, row["n_gen"] > 0) for row in rows] == [(True, False), (False, True)]
    assert len(rows[0]["samples_ts"]) == len(ran.turns)
    assert rows[1]["avg_ts"] == pytest.approx(sum(rows[1]["samples_ts"]) / len(ran.turns))
    lines = as_csv(read_report([ran.folder]).turns()).splitlines()
    assert lines[0].startswith("run,iteration,conversation,prompt,duration (sec),original_session_tokens,input_tokens")
    assert len(lines) == 1 + len(ran.turns)


# --- meters and clocks ------------------------------------------------------------------------------------------------


def test_rapl_counters_turn_over(tmp_path):
    for number, energy in ((0, 900), (1, 100)):
        package = tmp_path / f"intel-rapl:{number}"
        package.mkdir()
        (package / "energy_uj").write_text(str(energy))
        (package / "max_energy_range_uj").write_text("1000")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of a package, which would count twice
    counter = rapl(tmp_path, rate=500)
    assert counter.read() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50")  # turned over: 150
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("300")
    assert counter.read() == pytest.approx(350e-6)
    counter.start(Clock())
    counter.stop()
    assert counter.trace().source == "rapl"
    with pytest.raises(ValueError, match="no RAPL counters under"):
        rapl(tmp_path / "nowhere")


def test_nvml_without_a_driver():
    with pytest.raises(ValueError, match="no NVIDIA driver here"):
        nvml(library="libnothing-of-this-name.so")


@pytest.mark.parametrize(
    ("text", "energy"),
    [
        ("timestamp,current,voltage\n0,500,4\n36,500,4\n", 20.0),
        ("timestamp (ms),current (uA),voltage (mV)\n0,-500000,4000\n36000,-500000,4000\n", 20.0),
        ("time,power [W]\n0,2\n36,2\n", 20.0),
        ("timestamp,energy (J)\n0,10\n36,82\n", 20.0),
        ("0,500,4,\n36,500,4,\n", 20.0),
        ("timestamp,current,voltage\n0,500,4\n10,-1,-1\n20,,4\n36,500,4\n", 20.0),
    ],
)
def test_power_files_of_any_instrument(tmp_path, text, energy):
    path = tmp_path / "power.csv"
    path.write_text(text)
    assert read_csv(path).energy(0, 36) == pytest.approx(energy)


def test_bad_meters_and_files(tmp_path):
    for name, message in (("wattmeter", "no meter 'wattmeter'"), ("csv:", "no meter"), ("model:nokia", "no device 'nokia'")):
        with pytest.raises(ValueError, match=message):
            meter(name)
    path = tmp_path / "power.csv"
    for text, message in (
        ("", "is empty"),
        ("timestamp,colour\n0,1\n", "needs columns"),
        ("timestamp,power (hp)\n0,1\n", "power in hp is unknown"),
        ("timestamp,power\n0,1\n", "1 rows with all of"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_csv(path)


def test_clocks():
    jumped = iter([100.0, 100.4])
    clock = Clock(lambda: next(jumped))
    assert clock.drift == pytest.approx(0.4, abs=0.05)
    with pytest.raises(ValueError, match="the clock of the phone is 250 ms ahead"):
        check_clocks(0.25, "the phone")
    check_clocks(0.05, "the phone")


def test_the_method_checks_its_settings():
    assert MELT(formats="fp32, int4").formats == ("fp32", "int4")
    for settings, message in (
        ({"runtime": "mlc"}, "runtime is one of"),
        ({"formats": ""}, "formats names at least one"),
        ({"repetitions": 0}, "repetitions must be at least 1"),
        ({"max_busy": 2.0}, "max_busy is a share"),
    ):
        with pytest.raises(ValueError, match=message):
            MELT(**settings)
