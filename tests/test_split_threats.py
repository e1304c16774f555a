"""What a peer could do to split learning, and what it gets: row by row of docs/SPLIT.md's threat table."""

import concurrent.futures
import os
import pathlib
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch

pytest.importorskip("grpc", reason="grpcio is not installed: pip install -e .[split]")

import grpc  # noqa: E402

from gcompress import ConfigError, ExchangeError, LinkError, PayloadError, RefusedError, from_spec, split
from gcompress.split import wire  # noqa: E402
from gcompress.split.link import METHOD, Broken  # noqa: E402
from gcompress.split.wire import Frame, Kind  # noqa: E402
from tests.nested import same  # noqa: E402
from tests.split_tools import WIDTH, Proxy, Rogue, Trainer, good_body, model, serving  # noqa: E402

HERE = pathlib.Path(__file__).parent
REFUSAL_SECONDS = 1.0


def refused(trainer, words, kind=RefusedError):
    """The client is refused within a second, and told why."""
    started = time.monotonic()
    with pytest.raises(kind, match=words):
        trainer.client.connect()
    assert time.monotonic() - started < REFUSAL_SECONDS


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """Certificates of two authorities: the server's, and somebody else's."""
    folder = tmp_path_factory.mktemp("certificates")
    split.make_certificates(folder / "ours", clients=["anna", "client"])
    split.make_certificates(folder / "theirs", clients=["anna"])
    split.make_certificates(folder / "elsewhere", hosts=["example.org"], clients=["anna"])
    return folder


def server_files(folder):
    return {"certificate": folder / "server.pem", "key": folder / "server.key", "ca": folder / "ca.pem"}


def client_files(folder, name="anna"):
    return {"certificate": folder / f"{name}.pem", "key": folder / f"{name}.key", "ca": folder / "ca.pem"}


class TestStrangers:
    def test_mutual_tls_lets_the_right_one_in_and_knows_its_name(self, pki):
        with serving(listen=server_files(pki / "ours")) as (server, port):
            trainer = Trainer(port, name="whatever", **client_files(pki / "ours"))
            trainer.step(0)
            assert list(server._slots) == ["anna"], "the certificate says who it is"

    def test_a_wrong_certificate_is_refused_and_named(self, pki):
        with serving(listen=server_files(pki / "ours")) as (_, port):
            files = {**client_files(pki / "theirs"), "ca": pki / "ours" / "ca.pem"}
            refused(Trainer(port, **files), "the server refuses the client's certificate .*theirs/anna.pem")
            files = {"ca": pki / "ours" / "ca.pem"}
            refused(Trainer(port, **files), "the server refuses a client without a certificate")

    def test_a_server_with_a_wrong_certificate_is_refused_and_named(self, pki):
        with serving(listen=server_files(pki / "theirs")) as (_, port):
            refused(Trainer(port, **client_files(pki / "ours")), "server's certificate is not accepted under .*ca.pem")
        with serving(listen=server_files(pki / "elsewhere")) as (_, port):
            files = client_files(pki / "elsewhere")
            refused(Trainer(port, **files), "certificate is not accepted .* not valid for '127.0.0.1'")
            Trainer(port, server_name="example.org", **files).step(0)

    def test_tls_and_plaintext_do_not_meet(self, pki):
        with serving(listen=server_files(pki / "ours")) as (_, port):
            refused(Trainer(port), "the server speaks TLS")
        with serving() as (_, port):
            refused(Trainer(port, **client_files(pki / "ours")), "the server does not speak TLS")

    def test_tokens_over_tls(self, pki):
        listen = {**server_files(pki / "ours"), "ca": None, "tokens": {"anna": "s3cret-a", "berta": "s3cret-b"}}
        ca = pki / "ours" / "ca.pem"
        with serving(listen=listen) as (server, port):
            refused(Trainer(port, ca=ca, token="s3cret-x"), "the token is not one of this server's")
            refused(Trainer(port, ca=ca), "expected a token, got none")
            Trainer(port, ca=ca, token="s3cret-b", name="anna").step(0)
            assert list(server._slots) == ["berta"], "the token says who it is"

    def test_plaintext_stays_on_this_machine_unless_insecure_is_said(self, pki):
        for address in ("192.0.2.1:5000", "example.org:5000", "[2001:db8::1]:5000", "0.0.0.0:5000"):
            with pytest.raises(ConfigError, match="expected TLS, or insecure=True"):
                split.Link(address)
            split.Link(address, insecure=True)
        server = split.SplitServer(split.cut(model(), 3)[1], shape=(WIDTH,))
        with pytest.raises(ConfigError, match="reachable by others"):
            server.listen("0.0.0.0:0")
        own = {"certificate": pki / "ours" / "server.pem", "key": pki / "ours" / "server.key"}
        with pytest.raises(ConfigError, match="anyone could connect"):
            server.listen("0.0.0.0:0", **own)
        with pytest.raises(ConfigError, match="go together"):
            split.Link("localhost:1", ca=pki / "ours" / "ca.pem", certificate=pki / "ours" / "anna.pem")
        with pytest.raises(ConfigError, match="cannot read"):
            split.Link("localhost:1", ca=pki / "none.pem")

    def test_keys_are_for_their_owner(self, pki):
        modes = {path.name: os.stat(path).st_mode & 0o777 for path in (pki / "ours").iterdir()}
        assert {mode for name, mode in modes.items() if name.endswith(".key")} == {0o600}
        assert not any("ca.key" in name for name in modes)


class TestOtherConfiguration:
    OPTIONS = {"up": "mask:sparsity=0.9,bits=2", "down": "quantize:bits=4"}

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            ({"up": "topk:sparsity=0.9"}, r"up: the server has mask:\S+bits=2, the client topk:sparsity=0.9"),
            ({"down": "quantize:bits=3"}, "down: the server has quantize:bits=4, the client quantize:bits=3"),
            ({"shape": (7, 3)}, r"shape: the server has \[24\], the client \[7, 3\]"),
            ({"labels": "int32"}, "labels: the server has int64, the client int32"),
            ({"max_batch": 64}, "max_batch: the server has 512, the client 64"),
            ({"delta_samples": 600}, "delta_samples: the server has 0, the client 600"),
        ],
    )
    def test_is_refused_with_both_sides_named(self, other, words, caplog):
        with serving(**self.OPTIONS) as (_, port):
            refused(Trainer(port, **{**self.OPTIONS, **other}), words)
            Trainer(port, **self.OPTIONS).step(0)  # the server goes on serving
        assert any("configurations differ" in record.getMessage() for record in caplog.records), "on both sides"

    def test_two_processes_of_other_versions_and_configurations(self):
        """The client in another process, with another compressor, shape, and version of the format."""
        script = """
import sys, time, torch
from gcompress import split, GcompressError
from gcompress.split import wire
port = int(sys.argv[1])
def refusal(version=1, **other):
    wire.VERSION = version
    options = {"up": "mask:sparsity=0.9,bits=2", "down": "quantize:bits=4", "shape": (24,), **other}
    client = split.SplitClient(torch.nn.Linear(12, 24), split.Link(f"127.0.0.1:{port}", patience=5), **options)
    started = time.monotonic()
    try:
        client.connect()
        print("let in")
    except GcompressError as error:
        print(f"{time.monotonic() - started:.3f}", error)
refusal()
refusal(up="topk:sparsity=0.9")
refusal(shape=(25,))
refusal(version=2)
"""
        with serving(**self.OPTIONS) as (_, port):
            command = [sys.executable, "-c", script, str(port)]
            lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
        assert lines[0] == "let in", lines
        words = ["the client topk:sparsity=0.9", "the client [25]", "format version 2, this side speaks version 1"]
        for line, expected in zip(lines[1:], words, strict=True):
            assert expected in line and float(line.split()[0]) < REFUSAL_SECONDS, line

    def test_another_model_where_a_head_is_handed_over(self):
        rounds = split.Sequential(split.cut(model(), 3)[0], ["anna"], rounds=1)
        with serving(rounds=rounds) as (_, port):
            other = torch.nn.Sequential(torch.nn.Linear(12, 23), torch.nn.Linear(23, WIDTH))
            with pytest.raises(PayloadError, match="one side only"):
                Trainer(port, [other], name="anna").client.run_rounds(lambda number: None)


@pytest.fixture
def rogue():
    """A server, and a client of it that has shaken hands and keeps to no rule from then on."""
    with serving(**TestOtherConfiguration.OPTIONS) as (server, port):
        with Rogue(port, server.agreement) as client:
            assert client.hello().kind == Kind.WELCOME
            client.server, client.port = server, port
            yield client


def assert_refused(answer, words, code=grpc.StatusCode.INVALID_ARGUMENT):
    assert answer[0] == code and words in answer[1], answer


class TestOldMessages:
    def test_a_request_that_comes_twice_is_answered_twice_and_carried_out_once(self, rogue):
        body = good_body(rogue.agreement)
        first = rogue.ask(Kind.FORWARD, 0, 1, 16, body)
        weights = {name: tensor.clone() for name, tensor in rogue.server.tail.model.state_dict().items()}
        assert rogue.ask(Kind.FORWARD, 0, 1, 16, body) == first
        assert same(weights, rogue.server.tail.model.state_dict())
        assert rogue.ask(Kind.FORWARD, 1, 2, 16, good_body(rogue.agreement, 1)).kind == Kind.GRADIENT
        assert_refused(rogue.ask(Kind.FORWARD, 0, 1, 16, body), "got request 1 of step 0, expected request 3 of step 2")

    @pytest.mark.parametrize(
        ("step", "sequence", "words"),
        [
            (0, 2, "got request 2 of step 0"),
            (5, 1, "of step 5"),
            (0, 0, "request 0"),
            (0, 2**64 - 1, "expected request 1"),
        ],
    )
    def test_other_numbers_are_refused(self, rogue, step, sequence, words):
        assert_refused(rogue.ask(Kind.FORWARD, step, sequence, 16, good_body(rogue.agreement)), words)

    def test_a_repeated_number_with_other_contents_is_refused(self, rogue):
        rogue.ask(Kind.FORWARD, 0, 1, 16, good_body(rogue.agreement))
        other = good_body(rogue.agreement, 1)
        assert_refused(rogue.ask(Kind.FORWARD, 1, 1, 16, other), "got request 1 of step 1, expected request 2")

    def test_another_session_is_refused(self, rogue):
        answer = rogue.ask(Kind.FORWARD, 0, 1, 16, good_body(rogue.agreement), session=b"x" * 16)
        assert_refused(answer, "it is of another session")

    def test_an_answer_is_no_request(self, rogue):
        assert_refused(
            rogue.ask(Kind.GRADIENT, 0, 1, 16, good_body(rogue.agreement)), "got kind GRADIENT, expected one"
        )


class TestBombsAndPoison:
    def test_a_size_beyond_the_agreement_is_refused_by_its_header_alone(self, rogue):
        header = wire.HEADER.pack(b"GCWF", 1, Kind.FORWARD, 0, rogue.session, 0, 1, 16, 0, 1 << 40, 0)
        rogue.send(header + struct.pack("<I", wire.checksum(header)))
        assert_refused(rogue.receive(), "FORWARD announces 1099511627776 bytes, at most")

    def test_before_the_handshake_only_a_short_hello_may_come(self, rogue):
        with Rogue(rogue.port) as stranger:
            assert_refused(stranger.ask(Kind.FORWARD, 0, 1), "got kind FORWARD, expected one of HELLO")
        with Rogue(rogue.port) as stranger:
            answer = stranger.ask(Kind.HELLO, 0, 0, body=b"{" + b" " * wire.MESSAGE_LIMIT)
            assert_refused(answer, "HELLO announces 65537 bytes, at most 65536")
        with Rogue(rogue.port) as stranger:
            stranger.send(b"GET / HTTP/1.1\r\n\r\n" * 10)
            assert_refused(stranger.receive(), "begins with b'GET '")

    def test_a_message_beyond_the_links_cap_is_not_taken(self, rogue):
        rogue._sent.put(bytes(wire.CHUNK_BYTES + 1))
        assert rogue.receive()[0] == grpc.StatusCode.RESOURCE_EXHAUSTED

    @pytest.mark.parametrize("samples", [0, 15, 17, 513, 2**32 - 1])
    def test_another_number_of_samples_than_the_body_has_is_refused(self, rogue, samples):
        answer = rogue.ask(Kind.FORWARD, 0, 1, samples, good_body(rogue.agreement))
        assert answer[0] == grpc.StatusCode.INVALID_ARGUMENT
        assert rogue.server.tail.state_dict()["model"]["3.weight"].isfinite().all()

    def test_what_is_not_finite_or_has_no_such_class_changes_nothing(self, rogue):
        weights = {name: tensor.clone() for name, tensor in rogue.server.tail.model.named_parameters()}
        good = good_body(rogue.agreement)
        levels = 8 * 16
        bodies = {
            "levels hold inf": good[:levels] + struct.pack("<f", float("inf")) + good[levels + 4 :],
            "levels hold -1": good[:levels] + struct.pack("<f", -1.0) + good[levels + 4 :],
            "levels hold nan": good[:levels] + struct.pack("<f", float("nan")) + good[levels + 4 :],
            "is not finite": good[: levels + 4] + struct.pack("<f", float("nan")) + good[levels + 8 :],
            "labels: got 0 to 77": struct.pack("<q", 77) + bytes(levels - 8) + good[levels:],
            "labels: got -7 to 0": struct.pack("<q", -7) + bytes(levels - 8) + good[levels:],
        }
        for words, body in bodies.items():
            with Rogue(rogue.port, rogue.agreement) as client:
                client.hello(instance="0" * 32)
                assert_refused(client.ask(Kind.FORWARD, 0, 1, 16, body), words)
        assert all(torch.equal(weights[name], t) for name, t in rogue.server.tail.model.named_parameters())

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"agreement": 3}, "agreement is '3'"),
            ({"agreement": {}}, "has no field"),
            ({"client": "../../etc"}, "name: got"),
            ({"run": "../" * 10}, "run is not 32 hexadecimal digits"),
            ({"steps": [1.5]}, "steps is"),
            ({"steps": [7]}, "no common step"),
            ({"sequence": -1, "session": "00" * 16}, "expected a size"),
        ],
    )
    def test_hostile_handshakes_are_refused(self, rogue, fields, words):
        if "sequence" in fields:
            fields["session"] = rogue.session.hex()
        with Rogue(rogue.port, rogue.agreement) as client:
            answer = client.hello(**fields)
            assert answer[0] in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
            assert words in answer[1]

    @pytest.mark.parametrize(
        "spec", ["quantize:bits=4", "quantize:bits=1", "mask:sparsity=0.9,bits=3", "mask:bits=2,signed=false"]
    )
    def test_scales_are_checked_by_each_compressors_specification(self, spec):
        compressor = from_spec(spec)
        payload, _ = compressor.compress(torch.randn(5000))
        compressor.check(payload, 5000)
        for value, bad in (
            (-1.0, True),
            (float("inf"), True),
            (float("-inf"), True),
            (0.0, False),
            (float("nan"), compressor.name == "mask"),
        ):
            changed = payload.clone()
            changed[:4] = torch.tensor([value]).view(torch.uint8)
            if bad:
                with pytest.raises(PayloadError, match="expected finite ones of 0 or above"):
                    compressor.check(changed, 5000)
            else:
                compressor.check(changed, 5000)

    def test_indices_out_of_range_twice_or_unsorted_are_refused(self):
        compressor = from_spec("topk:sparsity=0.99,index=fixed")
        payload, _ = compressor.compress(torch.randn(1000))
        width = 10
        for indices in ([5, 5], [9, 3], [1000, 1001], [0, 1023]):
            bad = payload.clone()
            bits = torch.zeros(8 * (bad.numel() - 40), dtype=torch.uint8)
            for position, index in enumerate([*indices, *range(900, 908)][:10]):
                bits[position * width : (position + 1) * width] = torch.tensor(
                    [index >> bit & 1 for bit in range(width)]
                )
            bad[40:] = (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
            with pytest.raises(PayloadError):
                compressor.decode_into(bad, torch.empty(1000))

    def test_training_that_diverges_is_told_at_the_side_where_it_happens(self):
        with serving() as (server, port):
            trainer = Trainer(port)
            trainer.step(0)
            with torch.no_grad():
                next(trainer.client.head.parameters()).fill_(float("nan"))
            with pytest.raises(ExchangeError, match="not finite: training has diverged"):
                trainer.step(1)
            assert all(parameter.isfinite().all() for parameter in server.tail.model.parameters())


class TestSlowPeers:
    def test_who_does_not_shake_hands_is_sent_away_while_others_are_served(self):
        with serving(handshake_deadline=0.5) as (_, port), Rogue(port) as silent:
            silent.send(b"GCWF")
            trainer = Trainer(port)
            trainer.step(0)
            started = time.monotonic()
            code, _ = silent.receive()
            assert code == grpc.StatusCode.CANCELLED and time.monotonic() - started < 3
            trainer.step(1)

    def test_who_stops_in_mid_frame_is_sent_away(self):
        with serving(deadline=0.5) as (server, port), Rogue(port, server.agreement) as client:
            client.hello()
            client.send(wire.encode(Frame(Kind.FORWARD, client.session, 0, 1, 16, good_body(server.agreement)))[:-1])
            assert client.receive()[0] == grpc.StatusCode.CANCELLED
            Trainer(port).step(0)  # its place is free

    def test_who_is_silent_for_too_long_is_sent_away(self):
        with serving(idle=0.5) as (server, port), Rogue(port, server.agreement) as client:
            client.hello()
            assert client.receive()[0] == grpc.StatusCode.CANCELLED

    def test_a_client_gives_up_on_a_server_that_accepts_and_says_nothing(self):
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            trainer = Trainer(deaf.getsockname()[1], deadline=0.3, patience=0.6)
            started = time.monotonic()
            with pytest.raises(LinkError, match="given up after 0.6 s"):
                trainer.client.connect()
            assert time.monotonic() - started < 5

    def test_a_stalled_connection_is_replaced_and_the_step_is_taken_once(self):
        with serving() as (server, port), Proxy(port) as proxy:
            trainer = Trainer(proxy.port, deadline=0.5, patience=20)
            trainer.step(0)
            proxy.stalled.set()
            timer = threading.Timer(0.7, proxy.stalled.clear)
            timer.start()
            trainer.step(1)
            assert trainer.client.step == 2 and server._slots["client"].step == 2
            timer.join()

    def test_a_second_client_of_the_same_name_waits_for_the_first_to_go(self):
        with serving() as (_, port):
            first, second = Trainer(port), Trainer(port, patience=0.3)
            first.step(0)
            with pytest.raises(LinkError, match="a client named client is still connected"):
                second.client.connect()
            first.link.close()
            second.link.patience = 10
            second.client.connect()

    def test_a_second_client_of_another_name_needs_another_server(self):
        with serving() as (_, port):
            Trainer(port).step(0)
            refused(Trainer(port, name="other"), "serves one client, client; other needs another server")

    def test_a_server_that_does_not_read_stops_the_client_from_sending(self):
        """Of 256 MiB it takes the queue's 8 and what gRPC's window has, and gives up at its deadline."""
        release = threading.Event()

        def never_reads(requests, context):
            release.wait(20)
            yield b""

        handler = grpc.method_handlers_generic_handler(
            METHOD.split("/")[1], {METHOD.split("/")[2]: grpc.stream_stream_rpc_method_handler(never_reads)}
        )
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(2), handlers=[handler])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            link = split.Link(f"127.0.0.1:{port}", deadline=0.5)
            link.connect()
            with pytest.raises(Broken, match="no word"):
                link.exchange(Frame(Kind.FORWARD, body=bytes(256 << 20)), {})
            assert link.sockets.read() is None or link.sockets.read()[0] < 64 << 20
        finally:
            release.set()
            server.stop(0).wait()


def test_an_address_that_is_taken_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = split.SplitServer(split.cut(model(), 3)[1], shape=(WIDTH,))
        with pytest.raises(LinkError, match="cannot listen"):
            server.listen(f"127.0.0.1:{taken.getsockname()[1]}")
