// Runs a compiled model frame by frame with ONNX Runtime's C++ interface: a reader of docs/contract.md.
//
//   g++ -std=c++17 -O2 stream.cpp -o stream -I $ONNXRUNTIME/include -L $ONNXRUNTIME/lib -lonnxruntime
//   ./stream MODEL.onnx FRAMES.bin RESULTS.bin [BATCH]
//
// FRAMES.bin: the inputs of each step one after another, in the order of the metadata, as raw numbers; RESULTS.bin
// gets the outputs of each step the same way. JSON is read with nlohmann/json (Debian: nlohmann-json3-dev).
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

using nlohmann::json;
struct Type {
  ONNXTensorElementDataType onnx;
  size_t bytes;
  void (*fill)(Ort::Value&, size_t, double);
};
template <typename T> Type type() {
  auto fill = [](Ort::Value& v, size_t n, double x) { std::fill_n(v.GetTensorMutableData<T>(), n, static_cast<T>(x)); };
  return {Ort::TypeToTensorType<T>::type, sizeof(T), fill};
}
const std::map<std::string, Type> TYPES = {
    {"float32", type<float>()}, {"float64", type<double>()}, {"int64", type<int64_t>()}, {"int32", type<int32_t>()},
    {"int16", type<int16_t>()}, {"int8", type<int8_t>()},    {"uint8", type<uint8_t>()}, {"bool", type<bool>()},
};

class Stream {
 public:
  // Opens a compiled model for `batch` streams that advance together.
  Stream(const char* path, int64_t batch, Ort::SessionOptions opts = {}) : batch_(batch), session_(env_, path, opts) {
    auto text = session_.GetModelMetadata().LookupCustomMetadataMapAllocated("co3d", allocator_);
    if (!text) throw std::runtime_error("the model was not compiled by co3d-compile");
    info_ = json::parse(text.get());
    if (info_["version"] != 1) throw std::runtime_error("this C++ reader knows contract version 1 alone");
    for (size_t i = 0; i < session_.GetInputCount(); i++)
      inputs_.push_back(session_.GetInputNameAllocated(i, allocator_).get());
    for (size_t i = 0; i < session_.GetOutputCount(); i++)
      outputs_.push_back(session_.GetOutputNameAllocated(i, allocator_).get());
    reset();
  }

  // Starts all streams afresh.
  void reset() {
    for (const auto& s : info_["states"]) {
      const auto& initial = s["initial"];  // a number, or "inf", "-inf" or "nan"
      set(s["input"], filled(s, initial.is_string() ? std::stod(initial.get<std::string>()) : initial.get<double>()));
    }
  }

  // Advances all streams by one step: reads each input from `frames`, writes each output to `results`.
  void step(std::istream& frames, std::ostream& results) {
    for (const auto& spec : info_["inputs"]) {
      Ort::Value value = filled(spec, 0);
      frames.read(value.GetTensorMutableData<char>(), bytes(value, spec));
      set(spec["name"], std::move(value));
    }
    if (!frames) throw std::runtime_error("the frames end in the middle of a step");
    if (info_.value("valid", json()).is_string()) {
      const auto& pulse = info_["inputs"][0]["frames_per_step"];
      set(info_["valid"], filled({{"shape", {"N", pulse.is_null() ? json(1) : pulse}}, {"dtype", "bool"}}, 1));
    }
    std::vector<const char*> in, out;
    std::vector<Ort::Value> given;
    for (const auto& name : inputs_) in.push_back(name.c_str()), given.push_back(std::move(values_.at(name)));
    for (const auto& name : outputs_) out.push_back(name.c_str());
    auto made = session_.Run(Ort::RunOptions(), in.data(), given.data(), in.size(), out.data(), out.size());
    for (size_t i = 0; i < in.size(); i++) set(inputs_[i], std::move(given[i]));
    for (size_t i = 0; i < out.size(); i++) set(outputs_[i], std::move(made[i]));
    for (const auto& spec : info_["outputs"]) {
      const Ort::Value& value = values_.at(spec["name"]);
      results.write(value.GetTensorData<char>(), bytes(value, spec));
    }
    std::map<std::string, Ort::Value> next;  // no value feeds two states, so each can be moved
    for (const auto& s : info_["states"]) next.emplace(s["input"], std::move(values_.at(s["output"])));
    values_ = std::move(next);
  }

 private:
  void set(const std::string& name, Ort::Value value) { values_.insert_or_assign(name, std::move(value)); }

  static size_t bytes(const Ort::Value& value, const json& spec) {
    return value.GetTensorTypeAndShapeInfo().GetElementCount() * TYPES.at(spec["dtype"]).bytes;
  }

  Ort::Value filled(const json& spec, double number) {
    std::vector<int64_t> shape;
    for (const auto& size : spec["shape"]) shape.push_back(size == "N" ? batch_ : size.get<int64_t>());
    Ort::Value value = Ort::Value::CreateTensor(allocator_, shape.data(), shape.size(), TYPES.at(spec["dtype"]).onnx);
    const size_t count = value.GetTensorTypeAndShapeInfo().GetElementCount();
    TYPES.at(spec["dtype"]).fill(value, count, number);
    return value;
  }

  const int64_t batch_;
  json info_;
  Ort::Env env_;
  Ort::AllocatorWithDefaultOptions allocator_;
  Ort::Session session_;
  std::vector<std::string> inputs_, outputs_;
  std::map<std::string, Ort::Value> values_;
};

int main(int count, char** words) try {
  if (count < 4) throw std::runtime_error("give MODEL.onnx FRAMES.bin RESULTS.bin [BATCH]");
  Stream stream(words[1], count > 4 ? std::stoll(words[4]) : 1);
  std::ifstream frames(words[2], std::ios::binary);
  std::ofstream results(words[3], std::ios::binary);
  while (frames.peek() != EOF) stream.step(frames, results);
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
