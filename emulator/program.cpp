#include "program.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <sstream>
#include <unordered_map>

namespace emulator {

int size_of(Type type) {
  switch (type) {
    case Type::b8:
    case Type::u8:
    case Type::s8:
      return 1;
    case Type::b16:
    case Type::u16:
    case Type::s16:
    case Type::f16:
    case Type::bf16:
      return 2;
    case Type::b64:
    case Type::u64:
    case Type::s64:
    case Type::f64:
      return 8;
    case Type::b128:
      return 16;
    default:
      return 4;
  }
}

namespace {

const std::unordered_map<std::string, Type> kTypes = {
    {"b8", Type::b8},       {"u8", Type::u8},       {"s8", Type::s8},         {"b16", Type::b16},
    {"u16", Type::u16},     {"s16", Type::s16},     {"f16", Type::f16},       {"bf16", Type::bf16},
    {"b32", Type::b32},     {"u32", Type::u32},     {"s32", Type::s32},       {"f32", Type::f32},
    {"tf32", Type::tf32},   {"f16x2", Type::f16x2}, {"bf16x2", Type::bf16x2}, {"s16x2", Type::s16x2},
    {"u16x2", Type::u16x2}, {"b64", Type::b64},     {"u64", Type::u64},       {"s64", Type::s64},
    {"f64", Type::f64},     {"b128", Type::b128},   {"pred", Type::pred},
};

const std::unordered_map<std::string, Op> kOps = {
    {"mov", Op::mov},
    {"add", Op::add},
    {"sub", Op::sub},
    {"mul", Op::mul},
    {"mad", Op::mad},
    {"fma", Op::fma},
    {"div", Op::div},
    {"rem", Op::rem},
    {"min", Op::min},
    {"max", Op::max},
    {"neg", Op::neg},
    {"abs", Op::abs},
    {"sqrt", Op::sqrt},
    {"rcp", Op::rcp},
    {"rsqrt", Op::rsqrt},
    {"ex2", Op::ex2},
    {"lg2", Op::lg2},
    {"and", Op::and_},
    {"or", Op::or_},
    {"xor", Op::xor_},
    {"not", Op::not_},
    {"shl", Op::shl},
    {"shr", Op::shr},
    {"bfe", Op::bfe},
    {"bfi", Op::bfi},
    {"prmt", Op::prmt},
    {"lop3", Op::lop3},
    {"shf", Op::shf},
    {"popc", Op::popc},
    {"clz", Op::clz},
    {"brev", Op::brev},
    {"setp", Op::setp},
    {"selp", Op::selp},
    {"cvt", Op::cvt},
    {"cvta", Op::mov},
    {"ld", Op::ld},
    {"st", Op::st},
    {"ldmatrix", Op::ldmatrix},
    {"stmatrix", Op::stmatrix},
    {"movmatrix", Op::movmatrix},
    {"shfl", Op::shfl},
    {"vote", Op::vote},
    {"redux", Op::redux},
    {"activemask", Op::activemask},
    {"mma", Op::mma},
    {"bar", Op::bar},
    {"barrier", Op::bar},
    {"membar", Op::fence},
    {"fence", Op::fence},
    {"prefetch", Op::prefetch},
    {"bra", Op::bra},
    {"ret", Op::ret},
    {"exit", Op::ret},
};

const std::unordered_map<std::string, Compare> kCompares = {
    {"eq", Compare::eq}, {"ne", Compare::ne}, {"lt", Compare::lt},   {"le", Compare::le},
    {"gt", Compare::gt}, {"ge", Compare::ge}, {"lo", Compare::lt},   {"ls", Compare::le},
    {"hi", Compare::gt}, {"hs", Compare::ge}, {"num", Compare::num}, {"nan", Compare::nan},
};

const std::unordered_map<std::string, Mode> kModes = {
    {"lo", Mode::lo},   {"hi", Mode::hi},     {"wide", Mode::wide},     {"bfly", Mode::bfly}, {"idx", Mode::idx},
    {"up", Mode::up},   {"down", Mode::down}, {"ballot", Mode::ballot}, {"all", Mode::all},   {"any", Mode::any},
    {"uni", Mode::uni}, {"l", Mode::left},    {"r", Mode::right},
};

std::string trimmed(const std::string& text) {
  const auto begin = text.find_first_not_of(" \t\r\n"), end = text.find_last_not_of(" \t\r\n");
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

// Parts between the separator, but for those within brackets.
std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (const char c : text) {
    if (c == '{' || c == '[' || c == '(') depth++;
    if (c == '}' || c == ']' || c == ')') depth--;
    if (c == separator && depth == 0) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty()) parts.push_back(trimmed(part));
  return parts;
}

int round_up(int number, int multiple) { return (number + multiple - 1) / multiple * multiple; }

}  // namespace

class Parser {
 public:
  Parser(Program& program, const std::string& ptx, const std::string& entry) : p_(program), text_(ptx) {
    module_level();
    const size_t at = find_entry(entry);
    p_.name = entry;
    const size_t open = text_.find('(', at), close = text_.find(')', open), body = text_.find('{', at);
    if (open < body) parse_parameters(text_.substr(open + 1, close - open - 1));
    header(text_.substr(at, body - at));
    line_ = 1 + int(std::count(text_.begin(), text_.begin() + long(body), '\n'));
    parse_body(body);
    for (auto [instruction, label] : jumps_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) throw Fault(p_.name + ": a branch to " + label + ", which is not there");
      p_.instructions[size_t(instruction)].target = found->second;
    }
  }

 private:
  struct Value {
    Register number;
    Type kind;  // b32, b64 or pred
  };

  [[noreturn]] void fail(const std::string& what) const {
    throw Fault(p_.name + ": line " + std::to_string(line_) + ": " + what);
  }

  size_t find_entry(const std::string& entry) const {
    for (size_t at = text_.find(".entry"); at != std::string::npos; at = text_.find(".entry", at + 1)) {
      const size_t begin = text_.find_first_not_of(" \t\r\n", at + 6);
      const size_t end = text_.find_first_of(" \t\r\n({", begin);
      if (text_.substr(begin, end - begin) == entry) return at;
    }
    throw Fault("no kernel named " + entry + " in this PTX");
  }

  // Files, and shared memory that is declared outside the kernel.
  void module_level() {
    std::istringstream lines(text_);
    std::string line;
    while (std::getline(lines, line)) {
      const bool begins = !line.empty() && line[0] == '.';  // what is indented is a kernel's own
      line = trimmed(line.substr(0, line.find("//")));
      if (line.rfind(".file", 0) == 0) {
        int number = 0;
        std::istringstream(line.substr(5)) >> number;
        const size_t open = line.find('"'), close = line.find('"', open + 1);
        if (close != std::string::npos) files_[number] = line.substr(open + 1, close - open - 1);
      } else if (begins && (line.rfind(".shared", 0) == 0 || line.rfind(".extern .shared", 0) == 0)) {
        shared(line);
      }
    }
  }

  // `.shared .align 16 .b8 name[64];` What is declared without a size is what the launch asks for.
  void shared(const std::string& statement) {
    const size_t open = statement.find('['), close = statement.find(']');
    if (statement.find('[', open + 1) != std::string::npos) fail("unknown to the emulator: " + statement);
    size_t begin = statement.find_last_of(" \t", open) + 1;
    const std::string name = statement.substr(begin, open - begin), size = statement.substr(open + 1, close - open - 1);
    if (size.empty()) {
      dynamic_.push_back(name);
      return;
    }
    int align = 4, element = 1;
    if (const size_t at = statement.find(".align"); at != std::string::npos)
      align = std::stoi(statement.substr(at + 6));
    for (const auto& [word, type] : kTypes)
      if (statement.find("." + word + " ") != std::string::npos) element = size_of(type);
    p_.static_shared = round_up(p_.static_shared, align);
    symbols_[name] = uint64_t(p_.static_shared);
    p_.static_shared += element * std::stoi(size);
  }

  void parse_parameters(const std::string& list) {
    for (const std::string& declaration : split(list, ',')) {
      std::istringstream words(declaration);
      std::string word, name;
      int align = 0, bytes = 0;
      while (words >> word) {
        if (word == ".align" && !bytes) {
          words >> align;
        } else if (const auto type = kTypes.find(word.substr(word[0] == '.')); word[0] == '.' && type != kTypes.end()) {
          bytes = size_of(type->second);
        }
        name = word;
      }
      const size_t open = name.find('[');
      if (open != std::string::npos) {
        bytes *= std::stoi(name.substr(open + 1));
        name.resize(open);
      } else {
        align = bytes;
      }
      const int offset = round_up(p_.parameter_bytes, std::max(align, 1));
      p_.parameters.push_back({name, offset, bytes});
      p_.parameter_bytes = offset + bytes;
      symbols_[name] = Program::kParameters + uint64_t(offset);
    }
  }

  void header(const std::string& text) {
    for (const char* directive : {".maxntid", ".reqntid"})
      if (const size_t at = text.find(directive); at != std::string::npos) {
        p_.threads = 1;
        for (const std::string& part : split(text.substr(at + 8, text.find_first_of(".{\n", at + 8) - at - 8), ','))
          p_.threads *= std::stoi(part);
      }
  }

  void parse_body(size_t at) {
    int depth = 0;
    while (at < text_.size()) {
      const char c = text_[at];
      if (c == '\n') line_++;
      if (isspace(c)) {
        at++;
      } else if (text_.compare(at, 2, "//") == 0) {
        at = text_.find('\n', at);
      } else if (c == '{') {
        scopes_.push_back(next_scope_++);
        depth++, at++;
      } else if (c == '}') {
        scopes_.pop_back();
        at++;
        if (--depth == 0) return;
      } else if (text_.compare(at, 4, ".loc") == 0) {
        const size_t end = text_.find('\n', at);
        std::istringstream numbers(text_.substr(at + 4, end - at - 4));
        int file = 0, line = 0;
        numbers >> file >> line;
        set_source(file, line);
        at = end;
      } else {
        const size_t end = text_.find_first_of(";:\n{", at);
        const size_t name_end =
            text_.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_$", at);
        if (name_end != std::string::npos && name_end > at && text_[name_end] == ':' && name_end == end) {
          if (!labels_.emplace(text_.substr(at, end - at), int(p_.instructions.size())).second)
            fail("unknown to the emulator, a label that stands in several scopes: " + text_.substr(at, end - at));
          at = end + 1;
          continue;
        }
        const size_t stop = text_.find(';', at);
        const std::string statement = text_.substr(at, stop - at);
        parse_statement(trimmed(statement));
        line_ += int(std::count(statement.begin(), statement.end(), '\n'));
        at = stop + 1;
      }
    }
  }

  void set_source(int file, int line) {
    const auto key = std::make_pair(file, line);
    const auto [found, added] = source_numbers_.try_emplace(key, int(p_.sources.size()));
    if (added) p_.sources.emplace_back(files_.count(file) ? files_[file] : std::to_string(file), line);
    source_ = found->second;
  }

  void parse_statement(const std::string& statement) {
    if (statement.empty()) return;
    if (statement[0] != '.') return parse_instruction(statement);
    if (statement.rfind(".reg", 0) == 0) return declare(statement.substr(4));
    if (statement.rfind(".shared", 0) == 0) return shared(statement);
    if (statement.rfind(".pragma", 0) == 0) return;
    fail("unknown to the emulator: " + statement);
  }

  // `.b32 %r<9>` or `.b16 lo, hi`.
  void declare(const std::string& text) {
    std::istringstream words(text);
    std::string type;
    words >> type;
    const auto known = kTypes.find(type.substr(1));
    if (known == kTypes.end()) fail("unknown to the emulator: .reg" + text);
    const Type kind = kind_of(known->second);
    std::string rest;
    std::getline(words, rest);
    for (const std::string& name : split(rest, ',')) {
      const size_t open = name.find('<');
      if (open == std::string::npos) {
        registers_[scoped(scopes_.back(), name)] = fresh(kind);
      } else {
        const int count = std::stoi(name.substr(open + 1));
        for (int i = 0; i < count; i++)
          registers_[scoped(scopes_.back(), name.substr(0, open) + std::to_string(i))] = fresh(kind);
      }
    }
  }

  static std::string scoped(int scope, const std::string& name) { return std::to_string(scope) + " " + name; }
  static Type kind_of(Type type) {
    if (type == Type::pred) return type;
    if (type == Type::b128) throw Fault("registers of 128 bits are unknown to the emulator");
    return is_wide(type) ? Type::b64 : Type::b32;
  }
  Value fresh(Type kind) {
    int& count = kind == Type::pred ? p_.predicates : kind == Type::b64 ? p_.wide : p_.narrow;
    return {count++, kind};
  }

  // What stands for the number in an operand of this kind.
  Value constant(uint64_t value, Type kind) {
    const auto [found, added] = constants_.try_emplace({value, kind}, Value{});
    if (added) {
      found->second = fresh(kind);
      if (kind == Type::pred)
        p_.constant_predicates.emplace_back(found->second.number, value != 0);
      else
        p_.constants.push_back({found->second.number, value, kind == Type::b64});
    }
    return found->second;
  }

  Value value_of(const std::string& text, Type type) {
    const Type kind = kind_of(type);
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (const auto found = registers_.find(scoped(*scope, text)); found != registers_.end()) return found->second;
    if (text[0] == '%') {
      static const char* const known[] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                          "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                          "%nctaid.y", "%nctaid.z", "%laneid"};
      if (std::find(std::begin(known), std::end(known), text) == std::end(known)) fail("no register " + text);
      const auto [found, added] = p_.specials.try_emplace(text, 0);
      if (added) found->second = fresh(Type::b32).number;
      return {found->second, Type::b32};
    }
    if (const auto symbol = symbols_.find(text); symbol != symbols_.end()) return constant(symbol->second, kind);
    if (std::find(dynamic_.begin(), dynamic_.end(), text) != dynamic_.end())
      return constant(uint64_t(round_up(p_.static_shared, 128)), kind);
    if (text.rfind("0f", 0) == 0 || text.rfind("0F", 0) == 0)
      return constant(std::stoul(text.substr(2), nullptr, 16), kind);
    if (text.rfind("0d", 0) == 0 || text.rfind("0D", 0) == 0)
      return constant(std::stoull(text.substr(2), nullptr, 16), kind);
    size_t used = 0;
    uint64_t number = 0;
    try {
      number = text[0] == '-' ? uint64_t(std::stoll(text, &used, 0)) : std::stoull(text, &used, 0);
    } catch (const std::exception&) {
      fail("not an operand: " + text);
    }
    if (used < text.size() && text.substr(used) != "U") fail("not an operand: " + text);
    if (kind == Type::b32) number &= size_of(type) == 2 ? 0xffffu : 0xffffffffu;
    return constant(number, kind);
  }

  Register reg(const std::string& text, Type type) {
    const Value value = value_of(text, type);
    if (value.kind != kind_of(type)) fail(text + " is a register of another size than the instruction's");
    return value.number;
  }
  Register target(const std::string& text, Type type) { return text == "_" ? kNone : reg(text, type); }

  // The registers in braces, or the one.
  std::vector<std::string> several(const std::string& text) const {
    if (text[0] != '{') return {text};
    return split(text.substr(1, text.rfind('}') - 1), ',');
  }

  // `[%rd1 + 16]`
  void address(Instruction& i, int operand, const std::string& text) {
    if (text[0] != '[') fail("not an address: " + text);
    std::string inside = trimmed(text.substr(1, text.rfind(']') - 1));
    const size_t plus = inside.find('+');
    if (plus != std::string::npos) {
      i.offset = std::stoll(inside.substr(plus + 1), nullptr, 0);
      inside = trimmed(inside.substr(0, plus));
    }
    const Value value = value_of(inside, i.space == Space::shared ? Type::b32 : Type::b64);
    i.narrow_shared = value.kind == Type::b32;
    if (i.space != Space::shared && i.narrow_shared) fail("an address of 32 bits: " + text);
    i.of[size_t(operand)] = value.number;
  }

  void parse_instruction(const std::string& statement) {
    Instruction i{};
    i.to.fill(kNone), i.of.fill(kNone);
    i.line = line_, i.source = source_;
    i.text = statement;
    std::replace(i.text.begin(), i.text.end(), '\n', ' ');
    std::replace(i.text.begin(), i.text.end(), '\t', ' ');
    std::string rest = statement;
    if (rest[0] == '@') {
      const size_t end = rest.find_first_of(" \t");
      std::string guard = rest.substr(1, end - 1);
      i.negated_guard = guard[0] == '!';
      i.guard = reg(guard.substr(i.negated_guard), Type::pred);
      rest = trimmed(rest.substr(end));
    }
    const size_t end = rest.find_first_of(" \t\n");
    i.name = rest.substr(0, end);
    const std::vector<std::string> args =
        end == std::string::npos ? std::vector<std::string>{} : split(rest.substr(end), ',');
    std::vector<std::string> words = split(i.name, '.');
    // A name's "::" separates nothing; what follows it says how something is cached.
    words.erase(std::remove_if(words.begin(), words.end(), [](const std::string& w) { return w.find("::") != w.npos; }),
                words.end());
    decode(i, words, args);
    p_.instructions.push_back(i);
  }

  void decode(Instruction& i, const std::vector<std::string>& words, const std::vector<std::string>& args) {
    if (words[0] == "cp") return decode_copy(i, words, args);
    const auto op = kOps.find(words[0]);
    if (op == kOps.end()) fail("unknown to the emulator: " + i.text);
    i.op = op->second;
    std::vector<Type> types;
    bool rounded = false;
    for (size_t w = 1; w < words.size(); w++) {
      const std::string& word = words[w];
      if (const auto type = kTypes.find(word); type != kTypes.end()) {
        types.push_back(type->second);
      } else if (word == "ftz") {
        i.flush = true;
      } else if (word == "approx" || word == "full") {
        i.approximate = true;
      } else if (word == "rn" || word == "rz" || word == "rna") {
        rounded = true;
        i.truncate = word == "rz";
      } else if (word == "rni" || word == "rzi") {
        i.to_integer = true;
        i.truncate = word == "rzi";
      } else if (word == "NaN") {
        i.nan = true;
      } else if (word == "sat" || word == "satfinite") {
        if (i.op != Op::add && i.op != Op::fma && i.op != Op::cvt) fail("unknown to the emulator: " + i.text);
        i.saturate = true;
      } else if (word == "trans") {
        i.transposed = true;
      } else if (word == "clamp") {
        i.wrap = false;
      } else if (i.op == Op::bar && word == "warp") {
        i.op = Op::bar_warp;
      } else if ((i.op == Op::ld || i.op == Op::st || i.op == Op::ldmatrix || i.op == Op::stmatrix) &&
                 set_memory(i, word)) {
      } else if (i.op == Op::setp && set_compare(i, word)) {
      } else if (i.op == Op::setp || i.op == Op::redux) {
        if (!kOps.count(word)) {
          if (word != "sync") fail("unknown to the emulator: " + i.text);
        } else {
          i.combine = kOps.at(word);
        }
      } else if (const auto mode = kModes.find(word); mode != kModes.end()) {
        i.mode = mode->second;
      } else if (i.op == Op::mma && word[0] == 'm') {
        if (word.rfind("m16n8k", 0) != 0) fail("unknown to the emulator: " + i.text);
        i.vector = uint8_t(std::stoi(word.substr(6)));
      } else if (!harmless(i.op, word)) {
        fail("unknown to the emulator: " + i.text);
      }
    }
    i.type = types.empty() ? Type::none : types[0];
    i.contractable = !rounded && (i.type == Type::f32 || i.type == Type::f64);
    operands(i, types, args);
  }

  // Words that change nothing that is computed here.
  static bool harmless(Op op, const std::string& word) {
    static const char* const known[] = {"sync",   "aligned", "row",     "col", "cta",  "gl",
                                        "sys",    "sc",      "acq_rel", "cc",  "to",   "global",
                                        "shared", "proxy",   "async",   "b4e", "wrap", "noftz"};
    if (op == Op::prefetch) return word == "global" || word == "L2";
    if (op == Op::mov || op == Op::bra || op == Op::bar || op == Op::fence || op == Op::mma || op == Op::shfl ||
        op == Op::vote || op == Op::bar_warp || op == Op::movmatrix || op == Op::shf || op == Op::ldmatrix ||
        op == Op::stmatrix)
      return word == "m8n8" || std::find(std::begin(known), std::end(known), word) != std::end(known);
    return false;
  }

  static bool set_memory(Instruction& i, const std::string& word) {
    if (word == "shared")
      i.space = Space::shared;
    else if (word == "global")
      i.space = Space::global;
    else if (word == "param")
      i.space = Space::param;
    else if (word[0] == 'v' && isdigit(word[1]))
      i.vector = uint8_t(std::stoi(word.substr(1)));
    else if (word[0] == 'x' && isdigit(word[1]))
      i.vector = uint8_t(std::stoi(word.substr(1)));
    else
      return word == "nc" || word == "ca" || word == "cg" || word == "cs" || word == "wb" || word == "wt" ||
             word == "relaxed" || word == "volatile" || word == "weak" || word == "sync" || word == "aligned" ||
             word == "m8n8";
    return true;
  }

  static bool set_compare(Instruction& i, const std::string& word) {
    auto found = kCompares.find(word);
    if (found == kCompares.end() && word.size() == 3 && word[2] == 'u') {
      found = kCompares.find(word.substr(0, 2));
      i.unordered = found != kCompares.end();
    }
    if (found == kCompares.end()) return false;
    i.compare = found->second;
    return true;
  }

  void decode_copy(Instruction& i, const std::vector<std::string>& words, const std::vector<std::string>& args) {
    const auto has = [&](const char* word) { return std::find(words.begin(), words.end(), word) != words.end(); };
    if (!has("async") || has("bulk") || has("mbarrier")) fail("unknown to the emulator: " + i.text);
    if (has("commit_group")) {
      i.op = Op::cp_commit;
    } else if (has("wait_group") || has("wait_all")) {
      i.op = Op::cp_wait;
      i.mode = has("wait_all") ? Mode::wait_all : Mode::none;
      i.offset = has("wait_all") ? 0 : std::stoll(args.at(0), nullptr, 0);
    } else {
      i.op = Op::cp_async;
      i.space = Space::shared;
      i.vector = uint8_t(std::stoi(args.at(2), nullptr, 0));
      if (i.vector != 16 && (has("cg") || (i.vector != 4 && i.vector != 8)))
        fail("not a size that can be copied: " + i.text);
      address(i, 0, args.at(0));
      const int64_t to = i.offset;
      const bool narrow = i.narrow_shared;
      i.offset = 0;
      i.space = Space::global;
      address(i, 1, args.at(1));
      if (i.offset) fail("unknown to the emulator: " + i.text);
      i.space = Space::shared, i.offset = to, i.narrow_shared = narrow;
      if (args.size() > 3) i.of[2] = reg(args[3], Type::b32);
      i.type = Type::b8;
    }
  }

  void operands(Instruction& i, const std::vector<Type>& types, const std::vector<std::string>& args) {
    const Type type = i.type;
    const auto expect = [&](size_t count) {
      if (args.size() < count) fail("too few operands: " + i.text);
    };
    // The targets and operands of an instruction all of whose are of one type.
    const auto plain = [&](size_t sources) {
      if (args.size() != sources + 1) fail("not as many operands as expected: " + i.text);
      i.to[0] = target(args[0], type);
      for (size_t n = 0; n < sources; n++) i.of[n] = reg(args[n + 1], type);
    };
    switch (i.op) {
      case Op::mov:
        expect(2);
        if (args[0][0] == '{' || args[1][0] == '{') {
          const bool packs = args[1][0] == '{';
          i.op = packs ? Op::pack : Op::unpack;
          const auto parts = several(packs ? args[1] : args[0]);
          const Type part = parts.size() == 2 ? (is_wide(type) ? Type::b32 : Type::b16) : Type::b16;
          if (parts.size() * size_t(size_of(part)) != size_t(size_of(type))) fail("unknown to the emulator: " + i.text);
          i.from = part, i.vector = uint8_t(parts.size());
          for (size_t n = 0; n < parts.size(); n++)
            (packs ? i.of[n] : i.to[n]) = packs ? reg(parts[n], part) : target(parts[n], part);
          (packs ? i.to[0] : i.of[0]) = packs ? target(args[0], type) : reg(args[1], type);
          return;
        }
        return plain(1);
      case Op::add:
      case Op::sub:
      case Op::div:
      case Op::rem:
      case Op::min:
      case Op::max:
      case Op::and_:
      case Op::or_:
      case Op::xor_:
        return plain(2);
      case Op::mul:
      case Op::mad: {
        const Type to = i.mode == Mode::wide ? (size_of(type) == 2 ? Type::b32 : Type::b64) : type;
        expect(i.op == Op::mad ? 4 : 3);
        i.to[0] = target(args[0], to);
        i.of[0] = reg(args[1], type), i.of[1] = reg(args[2], type);
        if (i.op == Op::mad) i.of[2] = reg(args[3], to);
        return;
      }
      case Op::fma:
        return plain(3);
      case Op::neg:
      case Op::abs:
      case Op::sqrt:
      case Op::rcp:
      case Op::rsqrt:
      case Op::ex2:
      case Op::lg2:
      case Op::not_:
      case Op::brev:
        return plain(1);
      case Op::popc:
      case Op::clz:
        expect(2);
        i.to[0] = target(args[0], Type::b32), i.of[0] = reg(args[1], type);
        return;
      case Op::shl:
      case Op::shr:
        expect(3);
        i.to[0] = target(args[0], type), i.of[0] = reg(args[1], type), i.of[1] = reg(args[2], Type::b32);
        return;
      case Op::bfe:
        expect(4);
        i.to[0] = target(args[0], type), i.of[0] = reg(args[1], type);
        i.of[1] = reg(args[2], Type::b32), i.of[2] = reg(args[3], Type::b32);
        return;
      case Op::bfi:
        expect(5);
        i.to[0] = target(args[0], type), i.of[0] = reg(args[1], type), i.of[1] = reg(args[2], type);
        i.of[2] = reg(args[3], Type::b32), i.of[3] = reg(args[4], Type::b32);
        return;
      case Op::prmt:
      case Op::shf:
        return plain(3);
      case Op::lop3:
        return plain(4);
      case Op::setp: {
        expect(3);
        const auto targets = split(args[0], '|');
        i.to[0] = target(targets[0], Type::pred);
        if (targets.size() > 1) i.to[1] = target(targets[1], Type::pred);
        i.of[0] = reg(args[1], type), i.of[1] = reg(args[2], type);
        if (i.combine != Op::mov) {
          expect(4);
          if (args[3][0] == '!') fail("unknown to the emulator: " + i.text);
          i.of[2] = reg(args[3], Type::pred);
        }
        return;
      }
      case Op::selp:
        expect(4);
        i.to[0] = target(args[0], type), i.of[0] = reg(args[1], type), i.of[1] = reg(args[2], type);
        i.of[2] = reg(args[3], Type::pred);
        return;
      case Op::cvt: {
        expect(2);
        if (types.size() < 2) fail("unknown to the emulator: " + i.text);
        i.from = types[1];
        i.to[0] = target(args[0], type), i.of[0] = reg(args[1], i.from);
        if (type == Type::f16x2 || type == Type::bf16x2) {
          expect(3);
          i.of[1] = reg(args[2], i.from);
        }
        return;
      }
      case Op::ld:
      case Op::st: {
        expect(2);
        if (i.space == Space::none) fail("unknown to the emulator, an address of any space: " + i.text);
        const bool loads = i.op == Op::ld;
        const auto registers = several(args[loads ? 0 : 1]);
        if (registers.size() != i.vector) fail("not as many registers as the instruction says: " + i.text);
        for (size_t n = 0; n < registers.size(); n++) {
          // A load may go to a wider register.
          if (loads && registers[n] != "_" && !is_wide(type) && value_of(registers[n], type).kind == Type::b64) {
            if (n > 0 && !i.widens) fail("registers of two sizes: " + i.text);
            i.widens = true;
            i.to[n] = reg(registers[n], Type::b64);
          } else if (loads) {
            if (i.widens) fail("registers of two sizes: " + i.text);
            i.to[n] = target(registers[n], type);
          } else {
            i.of[n + 1] = reg(registers[n], type);
          }
        }
        return address(i, 0, args[loads ? 1 : 0]);
      }
      case Op::ldmatrix:
      case Op::stmatrix: {
        expect(2);
        const bool loads = i.op == Op::ldmatrix;
        if (type != Type::b16 || i.space != Space::shared) fail("unknown to the emulator: " + i.text);
        const auto registers = several(args[loads ? 0 : 1]);
        if (registers.size() != i.vector) fail("not as many registers as the instruction says: " + i.text);
        for (size_t n = 0; n < registers.size(); n++)
          (loads ? i.to[n] : i.of[n + 1]) = loads ? target(registers[n], Type::b32) : reg(registers[n], Type::b32);
        return address(i, 0, args[loads ? 1 : 0]);
      }
      case Op::movmatrix:
        i.type = Type::b32;
        expect(2);
        i.to[0] = target(args[0], Type::b32), i.of[0] = reg(args[1], Type::b32);
        return;
      case Op::shfl: {
        expect(5);
        const auto targets = split(args[0], '|');
        i.to[0] = target(targets[0], Type::b32);
        if (targets.size() > 1) i.to[1] = target(targets[1], Type::pred);
        for (size_t n = 0; n < 4; n++) i.of[n] = reg(args[n + 1], Type::b32);
        return;
      }
      case Op::vote:
        expect(3);
        i.to[0] = target(args[0], i.mode == Mode::ballot ? Type::b32 : Type::pred);
        if (args[1][0] == '!') fail("unknown to the emulator: " + i.text);
        i.of[0] = reg(args[1], Type::pred), i.of[1] = reg(args[2], Type::b32);
        return;
      case Op::redux:
        expect(3);
        i.to[0] = target(args[0], Type::b32), i.of[0] = reg(args[1], Type::b32), i.of[1] = reg(args[2], Type::b32);
        return;
      case Op::activemask:
        expect(1);
        i.to[0] = target(args[0], Type::b32);
        return;
      case Op::mma: {
        expect(4);
        if (types.size() != 4 || types[0] != Type::f32 || types[3] != Type::f32 || types[1] != types[2])
          fail("unknown to the emulator: " + i.text);
        i.from = types[1];
        size_t n = 0;
        const auto d = several(args[0]), a = several(args[1]), b = several(args[2]), c = several(args[3]);
        const size_t halves = i.vector * size_t(i.from == Type::tf32 ? 2 : 1) / 8;
        if (d.size() != 4 || c.size() != 4 || a.size() != 2 * halves || b.size() != halves || halves < 1 || halves > 2)
          fail("unknown to the emulator: " + i.text);
        for (const auto& each : d) i.to[n++] = target(each, Type::b32);
        n = 0;
        for (const auto& list : {c, a, b})
          for (const auto& each : list) i.of[n++] = reg(each, Type::b32);
        return;
      }
      case Op::bar:
        if (args.size() != 1 || args[0] != "0") fail("unknown to the emulator, a barrier of its own: " + i.text);
        return;
      case Op::bar_warp:
        expect(1);
        i.of[0] = reg(args[0], Type::b32);
        return;
      case Op::bra:
        expect(1);
        jumps_.emplace_back(int(p_.instructions.size()), args[0]);
        return;
      case Op::prefetch:
        expect(1);
        return address(i, 0, args[0]);
      case Op::fence:
      case Op::ret:
        return;
      default:
        fail("unknown to the emulator: " + i.text);
    }
  }

  struct Hash {
    size_t operator()(const std::pair<uint64_t, Type>& key) const {
      return std::hash<uint64_t>()(key.first * 31 + uint64_t(key.second));
    }
  };

  Program& p_;
  const std::string& text_;
  int line_ = 1, source_ = -1, next_scope_ = 0;
  std::vector<int> scopes_;
  std::map<int, std::string> files_;
  std::map<std::pair<int, int>, int> source_numbers_;
  std::unordered_map<std::string, Value> registers_;
  std::unordered_map<std::pair<uint64_t, Type>, Value, Hash> constants_;
  std::unordered_map<std::string, uint64_t> symbols_;
  std::vector<std::string> dynamic_;
  std::unordered_map<std::string, int> labels_;
  std::vector<std::pair<int, std::string>> jumps_;
};

Program::Program(const std::string& ptx, const std::string& entry, bool contract) : ptx(ptx) {
  Parser(*this, ptx, entry);
  if (instructions.empty() || instructions.back().op != Op::ret) {
    Instruction end{};
    end.op = Op::ret, end.name = end.text = "ret", end.to.fill(kNone), end.of.fill(kNone);
    instructions.push_back(end);
  }
  if (contract) contract_products();
}

// A product and a sum that say nothing of their rounding may be one instruction that rounds once, and ptxas makes it so
// wherever it can: here, where a sum follows in the product's basic block and the product's operands still stand.
void Program::contract_products() {
  std::vector<bool> begins(instructions.size() + 1, false);  // a basic block
  for (size_t at = 0; at < instructions.size(); at++)
    if (instructions[at].op == Op::bra) begins[at + 1] = begins[size_t(instructions[at].target)] = true;
  // What registers hold by kind and number, 32 bits first.
  std::map<std::pair<bool, Register>, const Instruction*> products;
  for (size_t at = 0; at < instructions.size(); at++) {
    Instruction& i = instructions[at];
    if (begins[at]) products.clear();
    const bool is_wide_sum = i.type == Type::f64;
    if (i.contractable && (i.op == Op::add || i.op == Op::sub) && !i.saturate) {
      for (const size_t side : {size_t(1), size_t(0)}) {
        const auto found = products.find({is_wide_sum, i.of[side]});
        if (found == products.end() || found->second->flush != i.flush) continue;
        const Register other = i.of[1 - side];
        // a b - c, c - a b: the machine knows whose sign is turned by mode and combine.
        i.combine = i.op;
        i.mode = side == 1 ? Mode::right : Mode::left;
        i.op = Op::fma;
        i.of[0] = found->second->of[0], i.of[1] = found->second->of[1], i.of[2] = other;
        i.name += " (contracted)";
        break;
      }
    }
    for (const auto& [wide_target, to] : targets_of(i)) {
      products.erase({wide_target, to});
      for (auto held = products.begin(); held != products.end();) {
        const bool stands =
            held->first.first != wide_target || (held->second->of[0] != to && held->second->of[1] != to);
        held = stands ? std::next(held) : products.erase(held);
      }
    }
    const bool own_operand = i.to[0] == i.of[0] || i.to[0] == i.of[1];
    if (i.op == Op::mul && i.contractable && i.guard == kNone && !own_operand) products[{is_wide_sum, i.to[0]}] = &i;
  }
}

// Registers that an instruction writes, whether of 64 bits; predicates are left out.
std::vector<std::pair<bool, Register>> Program::targets_of(const Instruction& i) {
  std::vector<std::pair<bool, Register>> targets;
  size_t count = i.to.size();
  bool wide = is_wide(i.type);
  switch (i.op) {
    case Op::setp:
    case Op::st:
    case Op::stmatrix:
    case Op::bra:
      return {};
    case Op::vote:
      if (i.mode != Mode::ballot) return {};
      break;
    case Op::shfl:
      count = 1;
      break;  // the other one is a predicate
    case Op::unpack:
      wide = is_wide(i.from);
      break;
    case Op::mul:
    case Op::mad:
      wide = i.mode == Mode::wide ? size_of(i.type) == 4 : wide;
      break;
    case Op::popc:
    case Op::clz:
      wide = false;
      break;
    case Op::ld:
      wide |= i.widens;
      break;
    default:
      break;
  }
  if (i.type == Type::pred) return {};
  for (size_t n = 0; n < count; n++)
    if (i.to[n] != kNone) targets.emplace_back(wide, i.to[n]);
  return targets;
}

}  // namespace emulator
