// The extension module emulator._machine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <tuple>

#include "machine.h"

namespace py = pybind11;
using namespace emulator;

namespace {

struct Result {
  std::vector<std::tuple<int, std::string, uint64_t>> lines;
  std::vector<std::tuple<int, std::string, uint64_t, uint64_t, uint64_t>> shared;
  uint64_t device_bytes = 0;
};

Result run_launch(const Program& program, std::array<int, 3> grid, int threads, int shared_bytes,
                  const py::bytes& arguments, const std::vector<std::pair<uint64_t, uint64_t>>& memory,
                  const std::optional<std::vector<int64_t>>& blocks, bool check_races, bool count_wavefronts) {
  Launch launch{grid, threads, shared_bytes, {}, {}, {}, check_races, count_wavefronts};
  const std::string bytes = arguments;
  launch.arguments.assign(bytes.begin(), bytes.end());
  for (const auto& [address, size] : memory) launch.memory.push_back({address, size});
  if (blocks) {
    if (blocks->empty()) return {};
    launch.blocks = *blocks;
  }
  Report report;
  {
    const py::gil_scoped_release without_gil;
    report = run(program, launch);
  }
  Result result;
  for (size_t i = 0; i < report.counts.size(); i++) {
    const Count& count = report.counts[i];
    const Instruction& instruction = program.instructions[i];
    if (!count.executed) continue;
    result.lines.emplace_back(instruction.line, instruction.name, count.executed);
    result.device_bytes += count.device_bytes;
    if (count.accesses)
      result.shared.emplace_back(instruction.line, instruction.name, count.accesses, count.wavefronts,
                                 count.without_conflicts);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_machine, m) {
  m.doc() = "Executes a kernel's PTX on the CPU; see emulator/__init__.py.";
  py::register_exception<Fault>(m, "Fault", PyExc_RuntimeError);

  py::class_<Result>(m, "Report", "What warps executed.")
      .def_readonly("lines", &Result::lines, "(line of the PTX, opcode, warp instructions) of every instruction.")
      .def_readonly(
          "shared", &Result::shared,
          "(line of the PTX, opcode, accesses, wavefronts, wavefronts without bank conflicts) of every instruction"
          " on shared memory, where they were counted.")
      .def_readonly("device_bytes", &Result::device_bytes, "That lanes loaded, stored or copied of device memory.");

  py::class_<Program>(m, "Program", "A kernel of a PTX module. Raises Fault for what the emulator does not know.")
      .def(py::init<const std::string&, const std::string&, bool>(), py::arg("ptx"), py::arg("entry"),
           py::arg("contract") = true)
      .def_readonly("name", &Program::name)
      .def_readonly("ptx", &Program::ptx, "The module's text.")
      .def_readonly("threads", &Program::threads, "That a block may have at most, 0 where the PTX does not say.")
      .def_readonly("static_shared", &Program::static_shared, "Bytes of shared memory that the kernel declares itself.")
      .def_property_readonly(
          "parameters",
          [](const Program& program) {
            std::vector<std::tuple<std::string, int, int>> list;
            for (const auto& p : program.parameters) list.emplace_back(p.name, p.offset, p.bytes);
            return list;
          },
          "(name, offset, bytes) of each.")
      .def("run", &run_launch, py::kw_only(), py::arg("grid"), py::arg("threads"), py::arg("shared_bytes"),
           py::arg("arguments"), py::arg("memory"), py::arg("blocks") = py::none(), py::arg("check_races") = true,
           py::arg("count_wavefronts") = false,
           "Executes a launch on the memory at the given (address, bytes). Raises Fault where the kernel does what it "
           "must not.");
}
