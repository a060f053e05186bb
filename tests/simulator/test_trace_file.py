import os
from pathlib import Path

import numpy as np
import pytest

from expertmesh.errors import SetupError
from expertmesh.simulator.sampling import Gaps, ServeGenClients
from expertmesh.simulator.trace_file import read_trace
from expertmesh.simulator.workload import Requests


def write(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def requests_of(path: Path) -> Requests:
    trace = read_trace(path)
    assert isinstance(trace, Requests)
    return trace


def test_azure(tmp_path: Path) -> None:
    requests = requests_of(
        write(
            tmp_path,
            "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            "2023-11-16 18:17:03.9799600,4808,10\n"
            "2023-11-16 18:17:05.0319600,3180,8\n",
        )
    )
    assert requests.at_s.tolist() == pytest.approx([0.0, 1.052])
    assert requests.prompt_tokens.tolist() == [4808, 3180]
    assert requests.output_tokens.tolist() == [10, 8]


def test_milliseconds_with_and_without_clients(tmp_path: Path) -> None:
    requests = requests_of(write(tmp_path, "t_ms,input_tokens,output_tokens\n6011,178,8\n"))
    assert requests.at_s.tolist() == [6.011]
    requests = requests_of(
        write(tmp_path, "t_ms,input_tokens,output_tokens,client\n0,725,517,51\n\n5,1,0,50\n")
    )
    assert requests.client.tolist() == [51, 50]
    assert requests.output_tokens.tolist() == [517, 1]


def test_own_format_in_any_order(tmp_path: Path) -> None:
    requests = requests_of(
        write(tmp_path, "prompt_tokens,at_s,cached_tokens,output_tokens\n10,2.5,4,7\n20,1.5,0,8\n")
    )
    assert requests.at_s.tolist() == [1.5, 2.5]
    assert requests.cached_tokens.tolist() == [0, 4]


def write_clients(folder: Path) -> Path:
    write(
        folder,
        "t_s,req_per_s,mean_in_tokens,mean_out_tokens,covered_frac,disp_index\n"
        "0,1.5,100,50,1,1\n600,1,200,60,1,1\n",
        "some_10min.csv",
    )
    return write(
        folder,
        "client,t_s,req_per_s,cv,pattern,p1,p2\n"
        "0,0,0.5,2,Gamma,0.25,8\n1,0,1,1.5,Weibull,0.7,1\n1,600,1,1,Normal,1,1\n",
        "some_clients.csv",
    )


def test_statistics_of_clients(tmp_path: Path) -> None:
    trace = read_trace(write_clients(tmp_path))
    assert isinstance(trace, ServeGenClients)
    assert trace.gaps.tolist() == [Gaps.GAMMA, Gaps.WEIBULL, Gaps.EXPONENTIAL]
    assert trace.span_s == 1200.0
    assert trace.mean_output_tokens.tolist() == [50.0, 60.0]
    assert len(trace.sample()) == 300 + 600 + 600


def test_statistics_without_their_lengths(tmp_path: Path) -> None:
    path = write_clients(tmp_path)
    (tmp_path / "some_10min.csv").unlink()
    with pytest.raises(SetupError, match=r"some_10min.csv: .*give a file that exists"):
        read_trace(path)
    with pytest.raises(SetupError, match=r"name the two …_clients.csv and …_10min.csv"):
        read_trace(path.rename(tmp_path / "other.csv"))


def test_statistics_of_a_window_without_lengths(tmp_path: Path) -> None:
    path = write_clients(tmp_path)
    path.write_text(path.read_text() + "1,1200,1,1,Gamma,1,1\n")
    with pytest.raises(SetupError, match=r"line 5: t_s: 1200: some_10min.csv has no such window"):
        read_trace(path)


def test_windows_with_a_hole(tmp_path: Path) -> None:
    path = write_clients(tmp_path)
    windows = tmp_path / "some_10min.csv"
    windows.write_text(windows.read_text() + "1900,1,200,60,1,1\n")
    with pytest.raises(SetupError, match="at equal distances"):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty: its first line must name the columns"),
        ("a,b,c\n1,2,3\n", "line 1: unknown columns 'a,b,c': use one of TIMESTAMP,"),
        ("t_ms,input_tokens,output_tokens\n", "no requests"),
        ("t_ms,input_tokens,output_tokens\n1,2\n", "line 2: 2 values for 3 columns"),
        (
            "t_ms,input_tokens,output_tokens\n1,2,3\n\n1,2,x\n",
            r"line 4: output_tokens: 'x': give a count of tokens, 0 or more",
        ),
        ("t_ms,input_tokens,output_tokens\n1,-2,3\n", "input_tokens: '-2': give a count"),
        ("t_ms,input_tokens,output_tokens\nnan,2,3\n", "t_ms: 'nan': give milliseconds"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,2\n",
            "TIMESTAMP: 'noon': give a date and time such as",
        ),
        ("at_s,prompt_tokens,output_tokens,at_s\n1,2,3,4\n", "name each column once"),
        ("at_s,prompt_tokens,output_tokens,client\n1,2,3,-4\n", "client: '-4': give a whole"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SetupError, match=message) as raised:
        read_trace(path)
    assert str(raised.value).startswith(str(path))


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="give a file that exists"):
        read_trace(tmp_path / "none.csv")
    path = tmp_path / "binary.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(SetupError, match="not a CSV file"):
        read_trace(path)


@pytest.mark.skipif("EXPERTMESH_TRACES" not in os.environ, reason="no folder of real traces")
def test_the_day_of_deepseek_r1() -> None:
    path = Path(os.environ["EXPERTMESH_TRACES"]) / "servegen/deepseek-r1_clients.csv"
    trace = read_trace(path)
    load = trace.load(600.0)
    assert load.requests.sum() == pytest.approx(1.384e6, rel=0.01)
    mean_output = load.output_tokens / load.requests
    low, high = np.percentile(mean_output, (5, 95))
    assert low == pytest.approx(795, rel=0.05)
    assert high == pytest.approx(3691, rel=0.05)
