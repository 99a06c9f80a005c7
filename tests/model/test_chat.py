import json
import re
from pathlib import Path

import pytest

from minipaged.errors import InvalidParameterError, MinipagedError, TokenizerError
from minipaged.model.catalog import BUILTIN
from minipaged.model.chat import ChatTemplate
from minipaged.model.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXPECTED = json.loads((FIXTURES / "chat.json").read_text(encoding="utf-8"))
USER = [{"role": "user", "content": "Who's there?"}]


def template(name: str) -> ChatTemplate:
    source = (FIXTURES / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source, EXPECTED["special_tokens"])


@pytest.mark.parametrize("case", EXPECTED["cases"], ids=lambda case: case["template"])
def test_rendering_equals_that_of_transformers(case):
    assert template(case["template"]).render(**case["arguments"]) == case["rendered"]


def test_the_chat_of_tiny_gives_the_golden_prompt_ids():
    golden = json.loads((FIXTURES / "tiny_golden.json").read_text(encoding="utf-8"))
    [chat] = [value for value in golden.values() if isinstance(value, dict) and "messages" in value]
    text = ChatTemplate.from_directory(BUILTIN / "tiny").render(chat["messages"])
    tokenizer = Tokenizer.from_directory(BUILTIN / "tiny")
    assert tokenizer.encode(text, add_special_tokens=False) == chat["prompt_ids"]


def test_a_template_that_refuses_is_quoted():
    system = [{"role": "system", "content": "x"}, *USER]
    with pytest.raises(TokenizerError, match="refused these messages: System role not supported$"):
        template("gemma").render(system)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for %}", "faulty in line 1"),
        ("\n\n{% endif %}", "faulty in line 3"),
        ("{% nonsense %}", "faulty in line 1"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ nothing.there }}", "'nothing' is undefined"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(a=1) }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_faulty_and_hostile_templates_are_typed_errors(source, words):
    with pytest.raises(TokenizerError, match=re.escape(words)):
        ChatTemplate(source).render(USER)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(10 ** 12) %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '%*d' | format(10000000000, 1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10000000000) }}",
        "{{ 'a'.center(10000000000) }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ 'a' | indent(10000000000, true) }}",
    ],
)
def test_templates_cannot_take_all_time_or_memory_by_a_number(source):
    with pytest.raises(TokenizerError, match=r"limit|wide|more than|too big|too large"):
        ChatTemplate(source).render(USER)


def test_formats_of_usual_width_work():
    source = "{{ '%5d|%s' % (3, 'x') }}{{ '%-4s|' | format('a') }}{{ '{:>3}'.format(1) }}{{ '=' * 3 }}{{ 2 ** 3 }}"
    assert ChatTemplate(source).render(USER) == "    3|xa   |  1===8"


def test_user_text_that_looks_like_a_format_is_only_text():
    source = "{{ messages[0].content.replace('x', messages[0].content).strip() }}"
    assert ChatTemplate(source).render([{"role": "user", "content": "50% * {0:999999}"}]) == "50% * {0:999999}"


def test_a_template_never_changes_the_callers_messages():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert template("chatml").render(messages) == "<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]


def test_parts_reach_templates_that_loop_over_them_and_are_joined_for_others():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    loop = "{% set c = messages[0]['content'] %}{% for p in c %}[{{ p.text }}]{% endfor %}"
    assert ChatTemplate(loop).render(messages) == "[a][b]"
    assert ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render(messages) == "a\nb"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("Hello", "messages is a str"),
        ({"role": "user", "content": "x"}, "must be a list"),
        ([], "messages is empty"),
        (["Hello"], r"messages\[0\] is 'Hello'"),
        ([{"content": "x"}], "with a role"),
        ([{"role": 1, "content": "x"}], "with a role"),
        ([*USER, {"role": "user", "content": 5}], r"messages\[1\]\['content'\] is a int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "only text is supported"),
        ([{"role": "user", "content": ["x"]}], "only text is supported"),
        ([{"role": "user", "content": "x", "extra": object()}], "holds a object"),
    ],
)
def test_malformed_messages_are_refused(messages, words):
    with pytest.raises(InvalidParameterError, match=words):
        template("chatml").render(messages)


def test_values_nested_too_deeply_are_refused():
    deep = []
    for _ in range(500):
        deep = [deep]
    with pytest.raises(InvalidParameterError, match="nested more than 100"):
        template("chatml").render(USER, extra=deep)
    with pytest.raises(InvalidParameterError, match="holds a function"):
        template("chatml").render(USER, tools=[lambda: None])


def test_a_message_without_content_is_the_templates_business():
    messages = [{"role": "assistant", "tool_calls": []}, {"role": "user", "content": None}]
    assert ChatTemplate("{% for m in messages %}{{ m.content }};{% endfor %}").render(messages) == ";None;"


def test_the_tool_template_is_taken_when_tools_are_given():
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tool"}]
    assert ChatTemplate(named).render(USER) == "plain"
    assert ChatTemplate(named).render(USER, tools=[{"name": "f"}]) == "1 tool"
    assert ChatTemplate("{{ tools | length }}").render(USER, tools=[{"name": "f"}]) == "1"
    with pytest.raises(TokenizerError, match="'rag'.*none named 'default'"):
        ChatTemplate({"rag": "x"}).render(USER)


@pytest.mark.parametrize(
    "source", [5, [], {}, [{"name": "default"}], ["x"], {"default": 5}, [{"name": 1, "template": "x"}]]
)
def test_templates_of_a_wrong_type_are_refused(source):
    with pytest.raises(TokenizerError, match="chat"):
        ChatTemplate(source)


def test_template_files_come_before_the_configuration(tmp_path):
    assert ChatTemplate.from_directory(tmp_path) is None
    config = {"chat_template": "{{ bos_token }}config", "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_directory(tmp_path).render(USER) == "<s>config"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ bos_token }}json"}')
    assert ChatTemplate.from_directory(tmp_path).render(USER) == "<s>json"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}jinja é\n", encoding="utf-8")
    assert ChatTemplate.from_directory(tmp_path).render(USER) == "<s>jinja é"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    both = ChatTemplate.from_directory(tmp_path)
    assert (both.render(USER), both.render(USER, tools=[{}])) == ("<s>jinja é", "tools")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match="not UTF-8"):
        ChatTemplate.from_directory(tmp_path)


def test_a_template_can_name_the_date():
    assert re.fullmatch(r"\d{4}-\d\d", ChatTemplate("{{ strftime_now('%Y-%m') }}").render(USER))


def test_text_of_templates_is_encoded_without_a_second_bos():
    tokenizer = Tokenizer.from_directory(BUILTIN / "tiny")
    text = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<|bos|>"}).render(USER)
    assert tokenizer.encode(text, add_special_tokens=False).count(tokenizer.bos_token_id) == 1


def test_lone_surrogates_pass_the_template_and_are_refused_by_the_tokenizer():
    text = ChatTemplate.from_directory(BUILTIN / "tiny").render([{"role": "user", "content": "\ud800"}])
    with pytest.raises(MinipagedError, match="surrogate"):
        Tokenizer.from_directory(BUILTIN / "tiny").encode(text)
