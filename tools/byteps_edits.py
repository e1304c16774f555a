"""What has to change in BytePS 0.2.5.post15 so that it builds without CUDA, and runs right.

EDITS is a list of (file, pattern, replacement, count): `re.sub` in DOTALL mode must find just
`count` places. Each is a few words of the original that locate a place; what stands there
afterwards is ours. `apply` refuses a release in which a place is not found, so that none is
built half-adjusted.
"""

import re

BUILD = [
    # TH is gone from torch, and these declarations are not used.
    ("byteps/torch/ops.h", r"#include <TH/TH\.h>\n", "", 1),
    ("byteps/torch/ops.h", r'#define PUSHPULL_H.*?(?=extern "C" int byteps_torch_poll)', "", 1),
    # torch's headers need C++20.
    ("setup.py", r'\["-std=c\+\+14" if flag', '["-std=c++20" if flag', 1),
    ("setup.py", r"include_paths\(cuda=True\)", "include_paths()", 1),
    # torch defines TORCH_VERSION itself, as a string.
    ("setup.py", r"'TORCH_VERSION', str", "'BYTEPS_TORCH_VERSION', str", 1),
    ("byteps/torch/ops.cc", r"\bTORCH_VERSION\b", "BYTEPS_TORCH_VERSION", 1),
    ("byteps/torch/adapter.cc", r"\bTORCH_VERSION\b", "BYTEPS_TORCH_VERSION", 1),
    ("byteps/torch/ready_event.cc", r"\bTORCH_VERSION\b", "BYTEPS_TORCH_VERSION", 5),
    (
        "byteps/torch/ops.cc",
        r"isIntegralType\(output\.scalar_type\(\)\)",
        "isIntegralType(output.scalar_type(), false)",
        1,
    ),
    # A cached wheel must run on other processors than the one that built it.
    ("setup.py", r"'-march=native', '-mno-avx512f'", "'-march=x86-64-v3'", 1),
    # The loopback and Ethernet need no RDMA, whatever this machine has installed.
    ("setup.py", r"return ret_code==0", "return False", 1),
    ("byteps/common/communicator.h", r"#include <mutex>\n", "#include <memory>\n#include <mutex>\n", 1),
    ("byteps/torch/ops.py", r"from distutils\.version import LooseVersion\n", "", 1),
]

RUN = [
    # An out-of-place push_pull of a CPU tensor wrote its result into the input.
    (
        "byteps/common/core_loops.cc",
        r"(auto gpu_addr = \(char \*\)\(tensor->data\(\)\) \+ offset;\n)"
        r"  if \(task->device == CPU_DEVICE_ID\) \{\n[^}]*\}\n",
        r"\1",
        1,
    ),
    # Workers on one host shared their buffers by name. Nobody else opens them, so the names can go at once: a
    # worker that is killed leaves nothing in /dev/shm.
    (
        "byteps/common/shared_memory.cc",
        r"std::string shm_name\(prefix\);\n",
        "std::string shm_name(prefix);\n"
        '  for (const char* name : {"BYTEPS_JOB", "DMLC_WORKER_ID"}) {\n'
        '    if (const char* value = getenv(name)) shm_name += std::string(value) + "_";\n'
        "  }\n",
        1,
    ),
    (
        "byteps/common/shared_memory.cc",
        r"(void\* ptr = mmap\([^;]*;\n)",
        r"\1  close(shm_fd);\n  if (BytePSGlobal::GetLocalSize() == 1) shm_unlink(shm_name.c_str());\n",
        1,
    ),
    # Waiting while holding Python's lock kept BytePS's own threads from freeing tensors: a deadlock.
    (
        "byteps/torch/ops.cc",
        r"&(DoPushPull|PollHandle|WaitAndClear|DeclareTensor)\);",
        r"&\1, pybind11::call_guard<pybind11::gil_scoped_release>());",
        15,
    ),
    # A function that promises a value and returns none.
    ("byteps/common/ready_table.cc", r"_ready_table\[key\] = cnt;", "return _ready_table[key] = cnt;", 1),
    # Receiving threads spun while they held the mutex that senders need.
    (
        "3rdparty/ps-lite/src/zmq_van.h",
        r"std::lock_guard<std::mutex> lk\(mu_\);(\s*// the zmq_msg_recv)",
        r"std::unique_lock<std::mutex> lk(mu_);\1",
        1,
    ),
    (
        "3rdparty/ps-lite/src/zmq_van.h",
        r"(else if \(errno == EAGAIN\) \{[^\n]*\n)",
        r"\1            lk.unlock();\n            std::this_thread::sleep_for(std::chrono::microseconds(50));\n",
        1,
    ),
    # Idle threads woke a million times a second.
    ("byteps/common/core_loops.cc", r"std::chrono::nanoseconds\(1000\)", "std::chrono::microseconds(50)", 11),
    # A key was hashed from a string that no longer existed: workers could disagree on its server.
    (
        "byteps/common/global.cc",
        r"auto str = std::to_string\(key\)\.c_str\(\);",
        "const std::string text = std::to_string(key);\n  auto str = text.c_str();",
        3,
    ),
]

# The answer to a pull was the very buffer that the next round's first push overwrites: a slow worker got parts of
# two rounds, and the replicas diverged. Each round's result is now a copy of its own, kept by the messages that
# still carry it. What the handler and the engine threads share is looked up under a lock.
SERVER = [
    (
        "byteps/server/server.h",
        r"(struct UpdateBuf \{\n)",
        r"\1  ps::SArray<char> result;  // of the last finished round\n",
        1,
    ),
    (
        "byteps/server/server.h",
        r"(std::unordered_map<uint64_t, std::unique_ptr<common::compressor::Compressor>> compressor_map_;\n)",
        r"""\1
// Both maps grow while engine threads read them. Their elements stay where they are.
std::mutex maps_mu_;
inline UpdateBuf& UpdateOf(uint64_t key) {
  std::lock_guard<std::mutex> lock(maps_mu_);
  return update_buf_[key];
}
inline bool HasUpdate(uint64_t key) {
  std::lock_guard<std::mutex> lock(maps_mu_);
  return update_buf_.count(key) > 0;
}
inline common::compressor::Compressor* CompressorOf(uint64_t key) {
  std::lock_guard<std::mutex> lock(maps_mu_);
  auto found = compressor_map_.find(key);
  return found == compressor_map_.end() ? nullptr : found->second.get();
}
inline void Publish(uint64_t key, const void* data, size_t len) {
  char* copy = new char[len];
  memcpy(copy, data, len);
  std::lock_guard<std::mutex> lock(pullresp_mu_);
  UpdateOf(key).result.reset(copy, len, [](char* p) { delete[] p; });
}
""",
        1,
    ),
    # Engine threads: publish what is finished.
    (
        "byteps/server/server.cc",
        r"auto& updates = update_buf_\[msg\.key\];\s*updates\.merged\.tensor = compressed\.data;\s*"
        r"updates\.merged\.len = compressed\.size;",
        "Publish(msg.key, compressed.data, compressed.size);",
        1,
    ),
    (
        "byteps/server/server.cc",
        r"auto& updates = update_buf_\[msg\.key\];\s*updates\.merged\.tensor = reinterpret_cast<char\*>\(msg\.src\);"
        r"\s*updates\.merged\.len = msg\.len;",
        "Publish(msg.key, msg.src, msg.len);",
        1,
    ),
    (
        "byteps/server/server.cc",
        r"auto iter = compressor_map_\.find\(msg\.key\);\s*if \(iter != compressor_map_\.end\(\)\) \{",
        "auto compressor = CompressorOf(msg.key);\n    if (compressor != nullptr) {",
        1,
    ),
    ("byteps/server/server.cc", r"iter->second->(Compress|Decompress)\(", r"compressor->\1(", 2),
    # Answers to pulls: send what was published.
    (
        "byteps/server/server.cc",
        r'CHECK\(updates\.merged\.tensor\) << "init "[^;]*;\s*char\* data = updates\.merged\.tensor;\s*'
        r"auto len = updates\.merged\.len;",
        'CHECK(updates.result.size()) << "key " << key << " has no finished round";\n'
        "  int len = static_cast<int>(updates.result.size());",
        1,
    ),
    (
        "byteps/server/server.cc",
        r"response\.vals = ps::SArray<char>\(data, len, false\);[^\n]*",
        "response.vals = updates.result;",
        1,
    ),
    (
        "byteps/server/server.cc",
        r"auto p = static_cast<char\*>\(data\);\s*CHECK\(p\);\s*response->lens = \{len\};\s*"
        r"response->vals = ps::SArray<char>\(p, len, false\);",
        "response->lens = {len};\n    response->vals = updates.result;",
        1,
    ),
    # The handler: the same maps, under the lock.
    ("byteps/server/server.cc", r"update_buf_\.find\(key\) == update_buf_\.end\(\)", "!HasUpdate(key)", 1),
    ("byteps/server/server.cc", r"update_buf_\[key\]", "UpdateOf(key)", 6),
    (
        "byteps/server/server.cc",
        r"if \(compressor_map_\.find\(key\) == compressor_map_\.end\(\)\) \{",
        "if (CompressorOf(key) == nullptr) {",
        1,
    ),
    (
        "byteps/server/server.cc",
        r"compressor_map_\[key\] = std::move\(compressor_ptr\);",
        "{\n        std::lock_guard<std::mutex> lock(maps_mu_);\n"
        "        compressor_map_[key] = std::move(compressor_ptr);\n      }",
        1,
    ),
]

# Compressors for torch, as MXNet has them: `declare(name, **parameters)`. A compressor also learns its partition's
# key and length in bytes, since a partition's buffer is rounded up and a server decodes before it encodes.
COMPRESSORS = [
    (
        "byteps/torch/ops.cc",
        r"(void WaitAndClear\(int handle\) \{)",
        r"""void DeclareCompressor(const std::string& name, std::unordered_map<std::string, std::string> parameters) {
  std::string tensor_name = GetOpName("byteps", name.c_str(), 0);
  common::IsTensorDeclared(tensor_name);
  common::RegisterCompressor(tensor_name, parameters);
}

\1""",
        1,
    ),
    (
        "byteps/torch/ops.cc",
        r'(m\.def\("byteps_torch_declare_tensor")',
        r'm.def("byteps_torch_declare_compressor", &DeclareCompressor);\n  \1',
        1,
    ),
    (
        "byteps/torch/ops.py",
        r"def declare\(name\):\n(\s+)c_lib\.byteps_torch_declare_tensor\(name\.encode\(\)\)\n",
        r"def declare(name, **parameters):\n\1c_lib.byteps_torch_declare_tensor(name.encode())\n"
        r"\1if parameters:\n"
        r"\1    parameters = {key: str(value) for key, value in parameters.items()}\n"
        r"\1    c_lib.byteps_torch_declare_compressor(name.encode(), parameters)\n",
        1,
    ),
    (
        "byteps/common/operations.cc",
        r"(auto compressor_ptr = compressor::CompressorRegistry::Create\()",
        'context.kwargs["partition_key"] = std::to_string(key);\n'
        '        context.kwargs["partition_bytes"] = std::to_string(len);\n'
        r"        \1",
        1,
    ),
    (
        "byteps/server/server.cc",
        r"(auto stored = GetStore\(key\);\n)(\s+)(size_t aligned_size = byteps::common::Align\(stored->len)",
        r"\1\2"
        r'kwargs["partition_key"] = std::to_string(key);\n\2'
        r'kwargs["partition_bytes"] = std::to_string(stored->len);\n\2\3',
        1,
    ),
]

# torch's Python side: names that Python 3.10 dropped, a GPU that is not there, options that are no numbers.
PYTHON = [
    ("byteps/torch/__init__.py", r"import collections\n", "import collections\nimport collections.abc\n", 1),
    ("byteps/torch/__init__.py", r"collections\.Iterable", "collections.abc.Iterable", 1),
    ("byteps/torch/__init__.py", r"\]\)\.cuda\(\)", "])", 2),
    (
        "byteps/torch/__init__.py",
        r"if option_key == 'params':",
        "if option_key == 'params' or option_value is None or isinstance(option_value, (bool, str)):",
        1,
    ),
]

EDITS = BUILD + RUN + SERVER + COMPRESSORS + PYTHON


class EditError(Exception):
    """A place that an edit names is not in the sources as often as expected."""


def apply(source, edits=None):
    """Edit the unpacked release at `source` (a pathlib.Path) in place; EditError if a place is not found."""
    for name, pattern, replacement, count in EDITS if edits is None else edits:
        path = source / name
        text, found = re.subn(pattern, replacement, path.read_text(encoding="utf-8"), flags=re.DOTALL)
        if found != count:
            raise EditError(f"{name}: expected {count} of {pattern!r}, found {found}")
        path.write_text(text, encoding="utf-8")
