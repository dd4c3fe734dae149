// JSON (RFC 8259): as much of it as the header of a model file needs. Reads text into values.
//
//   const Json header = Json::parse(text);             throws JsonError: what is wrong, and where
//   header["descriptor"]["zeta"].number();             JsonError names the entry that is missing
#pragma once

#include <charconv>
#include <cmath>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace kinml::md {

struct JsonError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Json {
 public:
  using List = std::vector<Json>;
  using Object = std::map<std::string, Json, std::less<>>;

  static Json parse(std::string_view text) {
    Reader reader{text};
    Json value = reader.value(0);
    reader.skip();
    if (reader.at != text.size()) reader.fail("something follows the end");
    return value;
  }

  bool is_null() const { return std::holds_alternative<std::monostate>(value_); }
  bool has(std::string_view name) const { return object().contains(name); }
  const Json& operator[](std::string_view name) const {
    const auto found = object().find(name);
    if (found == object().end()) throw JsonError("'" + std::string(name) + "' is missing");
    return found->second;
  }
  const Object& object() const { return get<Object>("an object"); }
  const List& list() const { return get<List>("a list"); }
  const std::string& text() const { return get<std::string>("a text"); }
  bool boolean() const { return get<bool>("true or false"); }
  double number() const { return get<double>("a number"); }
  std::int64_t integer() const {
    const double x = number();
    if (!(std::abs(x) < 9e15) || x != std::floor(x)) throw JsonError("a whole number is expected");
    return static_cast<std::int64_t>(x);
  }
  std::vector<double> numbers() const {
    return each<double>([](const Json& x) { return x.number(); });
  }
  std::vector<std::int64_t> integers() const {
    return each<std::int64_t>([](const Json& x) { return x.integer(); });
  }
  std::vector<std::string> texts() const {
    return each<std::string>([](const Json& x) { return x.text(); });
  }

 private:
  template <class T>
  const T& get(const char* what) const {
    if (const T* found = std::get_if<T>(&value_)) return *found;
    throw JsonError(std::string(what) + " is expected");
  }
  template <class T, class Function>
  std::vector<T> each(const Function& of) const {
    std::vector<T> result;
    for (const Json& entry : list()) result.push_back(of(entry));
    return result;
  }

  struct Reader {
    std::string_view text;
    std::size_t at = 0;

    [[noreturn]] void fail(const std::string& what) const {
      throw JsonError(what + " (byte " + std::to_string(at) + " of the header)");
    }
    void skip() {
      while (at < text.size() && std::string_view(" \t\r\n").find(text[at]) != text.npos) ++at;
    }
    char next() {
      if (at == text.size()) fail("the text ends too early");
      return text[at++];
    }
    void expect(char c) {
      skip();
      if (next() != c) fail(std::string("'") + c + "' is expected");
    }
    bool taken(char c) {
      skip();
      if (at == text.size() || text[at] != c) return false;
      ++at;
      return true;
    }
    bool word(std::string_view w) {
      if (text.substr(at, w.size()) != w) return false;
      at += w.size();
      return true;
    }

    Json value(int depth) {
      if (depth > 64) fail("it is nested too deeply");
      skip();
      Json result;
      if (taken('{')) {
        Object object;
        if (!taken('}')) {
          do {
            skip();
            std::string name = string();
            expect(':');
            object.insert_or_assign(std::move(name), value(depth + 1));
          } while (taken(','));
          expect('}');
        }
        result.value_ = std::move(object);
      } else if (taken('[')) {
        List list;
        if (!taken(']')) {
          do {
            list.push_back(value(depth + 1));
          } while (taken(','));
          expect(']');
        }
        result.value_ = std::move(list);
      } else if (at < text.size() && text[at] == '"') {
        result.value_ = string();
      } else if (word("true")) {
        result.value_ = true;
      } else if (word("false")) {
        result.value_ = false;
      } else if (!word("null")) {
        result.value_ = number();
      }
      return result;
    }
    double number() {
      double x = 0;
      const char* const begin = text.data() + at;
      const auto [end, error] = std::from_chars(begin, text.data() + text.size(), x);
      const bool is_number = *begin == '-' || (*begin >= '0' && *begin <= '9');
      if (at == text.size() || !is_number || error != std::errc()) fail("a value is expected");
      at += end - begin;
      return x;
    }
    std::string string() {
      if (next() != '"') fail("a text in quotes is expected");
      std::string result;
      for (char c = next(); c != '"'; c = next())
        result += c == '\\' ? escaped() : std::string(1, c);
      return result;
    }
    std::string escaped() {
      constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
      const char c = next();
      if (c == 'u') {
        std::uint32_t code = hexadecimal();
        if (code >= 0xd800 && code < 0xdc00 && word("\\u"))
          code = 0x10000 + ((code - 0xd800) << 10) + (hexadecimal() - 0xdc00);
        return utf8(code);
      }
      const std::size_t place = kFrom.find(c);
      if (place == kFrom.npos) fail("an unknown escape");
      return std::string(1, kTo[place]);
    }
    std::uint32_t hexadecimal() {
      std::uint32_t code = 0;
      for (int i = 0; i < 4; ++i) {
        const std::size_t digit = std::string_view("0123456789abcdef").find(char(next() | 0x20));
        if (digit == std::string_view::npos) fail("four hexadecimal digits are expected");
        code = 16 * code + static_cast<std::uint32_t>(digit);
      }
      return code;
    }
    static std::string utf8(std::uint32_t code) {
      const auto tail = [&](int shift) {
        return static_cast<char>(0x80 | ((code >> shift) & 0x3f));
      };
      if (code < 0x80) return {static_cast<char>(code)};
      if (code < 0x800) return {static_cast<char>(0xc0 | (code >> 6)), tail(0)};
      if (code < 0x10000) return {static_cast<char>(0xe0 | (code >> 12)), tail(6), tail(0)};
      return {static_cast<char>(0xf0 | (code >> 18)), tail(12), tail(6), tail(0)};
    }
  };

  std::variant<std::monostate, bool, double, std::string, List, Object> value_;
};

}  // namespace kinml::md
