"""Models of devices, a phone over a replayed adb, llama-server over HTTP."""

import json
import math
import stat
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from broadsheet.methods.estimates.melt import read_report
from broadsheet.methods.estimates.melt.adb import (
    Adb,
    AdbError,
    AdbMeter,
    powered,
    quiet,
    read_temperature,
    read_uevent,
    run_phone,
)
from broadsheet.methods.estimates.melt.clock import Clock
from broadsheet.methods.estimates.melt.config import ModelConfig, RunSettings, Sampling
from broadsheet.methods.estimates.melt.device import Power, Thermal, device, devices, sustain, work
from broadsheet.methods.estimates.melt.llamacpp import LlamaServerRuntime, wait_for_server
from broadsheet.methods.estimates.melt.meters import Meter
from broadsheet.methods.estimates.melt.session import run_session

# --- heat, throttling, battery ----------------------------------------------------------------------------------------


def test_heat_is_conserved_and_settles():
    node = Thermal(capacity=100.0, resistance=5.0, ambient=25.0, temperature=25.0)
    # beside it the same node by small steps of the differential equation
    temperature, out, tick = 25.0, 0.0, 0.01
    for watts, seconds in ((4.0, 60.0), (0.5, 200.0), (9.0, 33.3), (2.0, 0.25)):
        node.step(watts, seconds)
        for _ in range(round(seconds / tick)):
            flow = (temperature - 25.0) / 5.0
            out += flow * tick
            temperature += (watts - flow) * tick / 100.0
        assert node.temperature == pytest.approx(temperature, abs=0.01)
        assert node.heat_out == pytest.approx(out, rel=2e-3, abs=0.05)
        assert node.heat_in - node.heat_out == pytest.approx(100.0 * (node.temperature - 25.0), rel=1e-12)
    node.step(6.0, 1e5)
    assert node.temperature == pytest.approx(25.0 + 6.0 * 5.0)


def test_throttling_lowers_the_rate_and_never_raises_it():
    run = sustain(device("galaxy-s23"), "llama-2-7b", "q4_0", seconds=3600)
    assert run.throttled_after is not None
    assert run.steady < run.first_minute
    assert max(point.rate for point in run.points) == run.points[0].rate
    by_level = sorted({(point.level, point.rate) for point in run.points})
    assert [rate for _, rate in by_level] == sorted((rate for _, rate in by_level), reverse=True)
    stored = device("galaxy-s23").power.capacity * (run.points[-1].temperature - 25.0)
    assert run.heat_in - run.heat_out == pytest.approx(stored, rel=0.02)
    cool = sustain(device("jetson-agx-orin"), "llama-2-7b", "q4_0", seconds=600)
    assert cool.throttled_after is None
    assert cool.steady == pytest.approx(cool.first_minute)


def test_the_battery_ends_the_run():
    phone = device("pixel-6a")
    run = sustain(phone, "llama-2-7b", "fp16", seconds=1e6, step=30)
    assert run.emptied
    assert run.energy_mwh == pytest.approx(phone.power.battery_mah * phone.power.battery_v)
    assert run.points[0].battery == 1
    assert all(b.battery < a.battery for a, b in zip(run.points, run.points[1:], strict=False))
    assert math.isnan(sustain(device("raspberry-pi-5"), "llama-2-7b", "fp16", seconds=5).points[0].battery)


def test_fewer_bits_are_faster_where_memory_binds():
    from broadsheet.core.perf.architecture import architecture

    arch, phone = architecture("llama-2-7b"), device("galaxy-s23")
    wide, small = (work(arch, form, 100, 1, phone.at(0)) for form in ("fp16", "q4_0"))
    assert wide.operations == small.operations
    assert wide.seconds / small.seconds == pytest.approx(wide.nbytes / small.nbytes, rel=0.1)
    assert work(arch, "fp16", 0, 100).operations > 90 * wide.operations


def test_every_parameter_of_a_device_has_an_origin():
    for name in devices():
        one = device(name)
        assert set(one.power.origins) == set(Power.__dataclass_fields__) - {"origins"}
        assert one.chip.efficiency.origin == "assumed"


def test_bad_devices_are_refused(tmp_path):
    row = json.loads(Path(device.__code__.co_filename).with_name("devices").joinpath("pixel-6a.json").read_text())
    for change, message in (
        ({"power": {**row["power"], "idle": {"value": 1.0}}}, r"power\.idle is"),
        ({"power": {**row["power"], "levels": {"value": [1.0, 1.2], "origin": "assumed"}}}, "levels begin with 1 and fall"),
        ({"power": {**row["power"], "capacity": {"value": 0.0, "origin": "assumed"}}}, "capacity must be above 0"),
    ):
        path = tmp_path / "device.json"
        path.write_text(json.dumps({**row, **change}))
        with pytest.raises(ValueError, match=message):
            device(str(path))
    with pytest.raises(ValueError, match="unknown quantisation 'q9_9'"):
        sustain(device("pixel-6a"), "llama-2-7b", "q9_9")
    with pytest.raises(ValueError, match="seconds and step are above 0"):
        sustain(device("pixel-6a"), "llama-2-7b", "fp16", seconds=0)


# --- llama-server -----------------------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """The parts of llama-server's protocol that are used: a token a character, replies of three tokens."""

    held: list[int]

    def log_message(self, *args):
        pass

    def do_GET(self):
        known = {
            "/health": {"status": "ok"},
            "/props": {"default_generation_settings": {"n_ctx": 4096}, "chat_template": ""},
        }
        self._send(json.dumps(known[self.path]))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self._send(json.dumps({"tokens": [ord(c) for c in body["content"]]}))
            return
        time.sleep(0.02)  # it says that it took 5 ms
        ids, held = body["prompt"], self.server.held
        shared = 0
        while body["cache_prompt"] and shared < min(len(ids) - 1, len(held)) and ids[shared] == held[shared]:
            shared += 1
        self.server.held = [*ids, 111, 107]  # the last token is not run
        events = [{"content": c, "tokens": [ord(c)]} for c in "ok."]
        timings = {"prompt_n": len(ids) - shared, "prompt_ms": 2.0, "predicted_n": 3, "predicted_ms": 3.0}
        events.append({"content": "", "tokens": [], "stop": True, "timings": timings})
        self._send("".join(f"data: {json.dumps(event)}\n\n" for event in events))

    def _send(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server():
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    running.held = []
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def test_llama_server_over_http(server, tmp_path):
    settings = RunSettings(context=512, max_gen=8, repetitions=1, conversations=1, warmup=0, max_busy=1.0)
    runtime = LlamaServerRuntime(server, "server", ModelConfig("m"), settings, Clock())
    wait_for_server(server, 5)
    run = run_session(runtime, [("hello", "again")], Meter(), tmp_path)
    first, second = run.turns
    assert first.output_tokens == 3
    assert first.session_tokens == 0
    assert first.input_tokens == len("user: hello\nassistant:")
    assert second.session_tokens == first.input_tokens + 2  # the reply's tokens came back and are in its cache
    assert second.input_tokens == 1 + len("\nuser: again\nassistant:")
    assert first.decode_tps == pytest.approx(1000, rel=1e-3)
    assert first.prefill.seconds == pytest.approx(0.002, rel=1e-3)
    assert first.unaccounted < 1e-3


class Recorded(BaseHTTPRequestHandler):
    """Answers a request as the llama-server did whose answers were recorded; one that was not recorded is an error."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body):
        known = [one["reply"] for one in self.server.exchanges if (one["path"], one["body"]) == (self.path, body)]
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write((known[0] if known else f"not recorded: {body}").encode())


def test_a_recorded_llama_server():
    """The texts are those that llama-cpp-python gives of the same file; see tests/golden."""
    golden = json.loads((Path(__file__).parents[3] / "golden" / "llama_server.json").read_text(encoding="utf-8"))
    running = ThreadingHTTPServer(("127.0.0.1", 0), Recorded)
    running.exchanges = golden["exchanges"]
    threading.Thread(target=running.serve_forever, daemon=True).start()
    config = ModelConfig("pocket-2m", sampling=Sampling(temperature=0))
    address = f"http://127.0.0.1:{running.server_port}"
    runtime = LlamaServerRuntime(address, "server", config, RunSettings(context=512, max_gen=24), Clock())
    runtime.load()
    for before, turn in zip([None, *golden["turns"]], golden["turns"]):
        if before is None or before["conversation"] != turn["conversation"]:
            runtime.begin(turn["conversation"])
        answer = runtime.answer(turn["question"])
        assert {name: getattr(answer, name) for name in turn if hasattr(answer, name)} == {
            name: value for name, value in turn.items() if name not in ("conversation", "question")
        }
    running.shutdown()


def test_servers_that_cannot(server):
    settings = RunSettings(context=8192)
    with pytest.raises(ValueError, match="has a context of 4096, the run wants 8192"):
        LlamaServerRuntime(server, "server", ModelConfig("m"), settings, Clock()).load()
    with pytest.raises(ValueError, match=r"no llama-server at http://127\.0\.0\.1:9"):
        LlamaServerRuntime("http://127.0.0.1:9", "server", ModelConfig("m"), settings, Clock()).load()
    with pytest.raises(ValueError, match="is at an address"):
        LlamaServerRuntime("model.gguf", "server", ModelConfig("m"), settings, Clock())
    with pytest.raises(ValueError, match="was not ready after 0 s"):
        wait_for_server("http://127.0.0.1:9", 0.3)


# --- adb --------------------------------------------------------------------------------------------------------------
# The transcript is written after Android's documentation and the authors' scripts; no phone was at hand to record one.

UEVENT = "POWER_SUPPLY_STATUS=Discharging\nPOWER_SUPPLY_VOLTAGE_NOW=4000000\nPOWER_SUPPLY_CURRENT_NOW=-900000\n"
DUMPSYS = "Current Battery Service state:\n  AC powered: false\n  USB powered: false\n  level: 87\n  temperature: 312\n"
FAKE = """
import json, sys, time
state, log = {state!r}, {log!r}
arguments = sys.argv[1:]
if arguments[:1] == ["-s"]:
    arguments = arguments[2:]
command = " ".join(arguments)
with open(log, "a") as file:
    file.write(command + "\\n")
if command == "shell date +%s.%N":
    print(f"{{time.time() + json.load(open(state))['ahead']:.9f}}")
    sys.exit()
for pattern, answer in json.load(open(state))["answers"]:
    if command.startswith(pattern):
        print(answer)
        sys.exit()
print(f"error: device offline ({{command}})", file=sys.stderr)
sys.exit(1)
"""


@pytest.fixture
def phone(tmp_path):
    """An adb that replays a transcript: `answers` by the beginning of a command."""
    state, log, program = tmp_path / "state.json", tmp_path / "adb.log", tmp_path / "adb"
    answers = {
        "shell getprop ro.product.manufacturer": "Google", "shell getprop ro.product.model": "Pixel 6a",
        "shell getprop ro.build.version.release": "14", "shell getprop ro.soc.model": "GS101",
        "shell dumpsys battery": DUMPSYS, "shell cat /sys/class/power_supply/battery/uevent": UEVENT,
        "shell settings get system screen_brightness_mode": "1", "shell settings get": "null", "shell settings put": "",
        "shell settings delete": "", "shell am force-stop": "", "shell mkdir": "", "shell stat": "", "push": "1 file pushed",
        "shell chmod": "", "shell cd /data/local/tmp/broadsheet": "4711", "forward": "", "shell kill 4711": "",
    }  # fmt: skip
    state.write_text(json.dumps({"answers": list(answers.items()), "ahead": 0.0}))
    program.write_text(f"#!{sys.executable}\n" + FAKE.format(state=str(state), log=str(log)))
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    one = Adb("PIXEL", str(program))

    def change(answers=(), **values):
        row = json.loads(state.read_text())
        row["answers"] = [*answers, *row["answers"]]
        state.write_text(json.dumps({**row, **values}))

    return one, log, change


def test_units_of_fuel_gauges():
    assert read_uevent(UEVENT) == (900.0, 4.0)
    assert read_uevent("POWER_SUPPLY_CURRENT_NOW=850\nPOWER_SUPPLY_VOLTAGE_NOW=3900") == (850.0, 3.9)  # mA and mV
    assert read_temperature(DUMPSYS) == 31.2
    assert powered(DUMPSYS.replace("USB powered: false", "USB powered: true")) == ["USB"]
    with pytest.raises(AdbError, match="no CURRENT_NOW"):
        read_uevent("POWER_SUPPLY_VOLTAGE_NOW=1")


def test_a_run_on_a_phone(phone, server, tmp_path):
    adb, log, _ = phone
    files = [tmp_path / name for name in ("llama-server", "tiny-q4_0.gguf")]
    for path in files:
        path.write_bytes(b"12345")
    port = int(server.rsplit(":", 1)[1])  # where the stand-in for the phone's server listens
    settings = RunSettings(context=512, max_gen=8, repetitions=1, conversations=1, warmup=0, idle=0.3, tail=0.3)
    where = tmp_path / "run"
    run = run_phone(adb, *files, ModelConfig("tiny"), settings, [("hello", "again")], where, stop=["com.chat"], port=port)
    assert run.configuration["device"]["model"] == "Pixel 6a"
    assert run.configuration["battery_c"] == 31.2
    assert run.configuration["format"] == "q4_0"
    assert run.trace.source == "adb:PIXEL"
    assert not run.trace.simulated
    assert run.idle_power == pytest.approx(3600)
    assert run.energies()[0].total == pytest.approx(3600 * run.turns[0].whole.seconds / 3600, rel=1e-3)
    assert "simulated" not in read_report([run.folder]).files()["report.md"]
    said = log.read_text().splitlines()
    assert "shell am force-stop com.chat" in said
    assert any(line.startswith(f"push {files[1]} /data/local/tmp/broadsheet/") for line in said)
    assert said.index("shell settings put system screen_brightness_mode 0") < said.index(
        "shell settings put system screen_brightness_mode 1"  # as it was before
    )
    assert "shell settings delete system screen_brightness" in said
    assert "shell kill 4711 2>/dev/null || true" in said


def test_phones_that_would_give_wrong_numbers(phone, tmp_path):
    adb, log, change = phone
    change([["shell dumpsys battery", DUMPSYS.replace("USB powered: false", "USB powered: true")]])
    with pytest.raises(AdbError, match="powered by USB: unplug it"):
        AdbMeter(adb).start(Clock())
    change(ahead=3.0)
    with pytest.raises(ValueError, match=r"the clock of the device is \d+ ms ahead"):
        run_phone(adb, tmp_path / "s", tmp_path / "m", ModelConfig("m"), RunSettings(), [("a",)], tmp_path / "run")
    assert "shell settings delete system screen_brightness" in log.read_text()  # set back although it failed


def test_adb_itself(phone, tmp_path):
    adb, _, _ = phone
    with pytest.raises(AdbError, match="device offline"):
        adb.shell("reboot")
    with pytest.raises(AdbError, match="is not installed"):
        Adb(program=str(tmp_path / "nothing")).shell("ls")
    with pytest.raises(AdbError, match="no file"):
        adb.push(tmp_path / "nothing", "/data")
    with pytest.raises(RuntimeError), quiet(adb):
        raise RuntimeError
