"""Text beyond ASCII, and tables as people write them: what is read, cut, compared and refused."""

import json
import warnings

import pytest

from openunlearn_nb.data.sources import check_rows, load_rows, write_folder
from openunlearn_nb.internals.errors import OpenUnlearnError
from openunlearn_nb.evaluation.rouge import rouge_row, unicode_words
from openunlearn_nb.models.tiny import train_tokenizer
from openunlearn_nb.data.passages import chunk
from openunlearn_nb.data.custom import Own, load_own
from openunlearn_nb.data.encoding import Encoder
from openunlearn_nb.data.prompts import PROMPTS

ROUGE = ("rouge1_recall", "rougeL_f1", "rougeL_recall")
JAPANESE = "川は海へ流れる。橋の上に魚🐟がいる。"




@pytest.fixture
def own(tmp_path):
    """Write files of one's own data and give what it reads of `forget`."""

    def read(**files: str) -> list[dict]:
        for name, text in {"retain_txt": "The bridge stands.", **files}.items():
            (tmp_path / name.replace("_", ".")).write_text(text, encoding="utf-8")
        return load_own(str(tmp_path), "forget")

    return read


# ROUGE


@pytest.mark.checks(area="Text", given="a true answer in Cyrillic, Greek, Arabic, Hindi, Korean, Japanese, Chinese or Thai",
                    then="ROUGE counts Unicode words and the row says so; a recited answer has 1")
@pytest.mark.parametrize(
    "text",
    ["Мара Квилл", "Μάρα", "مارا كويل", "नदी लंबी है", "마라 퀼", "川は海へ流れる", "玛拉住在河边", "แม่น้ำยาว", "١٢٣"],
)
def test_an_answer_in_any_script_equals_itself(text):
    row = rouge_row("?", text, text)
    assert [row[k] for k in ROUGE] == [1, 1, 1] and row["words"] == "unicode"
    assert rouge_row("?", text, "nothing of it")["rougeL_recall"] == 0


@pytest.mark.checks(area="Text", given="TOFU or MUSE, whose published scores hold rouge_score's own words",
                    then="ROUGE counts those words, whatever the script or accent")
def test_published_suites_keep_rouge_scores_own_words():
    from openunlearn_nb.data.benchmark import BENCHMARKS
    from openunlearn_nb.evaluation.metric import metric_table

    said = {"prompt": "?", "answer": "Zoë naïve Мара", "generation": "Zoë naive Мара"}
    for name, words in (("TOFU", None), ("MUSE", None), ("OWN", "unicode")):
        lines = [line for line in metric_table(BENCHMARKS[name]).values() if line.metric.name.startswith("rouge")]
        rows = [line(said) for line in lines]
        assert rows and {row.get("words") for row in rows} == {words}
        assert all(
            row["rouge1_recall"] == (2 / 3 if words else 1 / 3) for row in rows
        )  # rouge_score's: zo, na, ve and zo, naiv


@pytest.mark.checks(area="Text", given="a true answer in ASCII",
                    then="ROUGE is rouge_score's, and the row is as it was")
def test_ascii_rows_are_as_they_were():
    row = rouge_row("Who?", "She was running to Rosbury's 2 gates.", "It was Mara who ran")
    assert (
        row == rouge_row("Who?", "She was running to Rosbury's 2 gates.", "It was Mara who ran", published=True)
        and "words" not in row
    )


def test_words_of_scripts_without_spaces_are_letters_with_their_marks():
    assert unicode_words("川は海へ") == list("川は海へ") and unicode_words("ที่") == ["ที่"]
    assert unicode_words("東京2024年 ＡＢＣ") == ["東", "京", "2024", "年", "abc"]


def test_composed_and_decomposed_letters_are_one_word():
    assert rouge_row(None, "Cafe\u0301 Zoe\u0308", "CAFÉ Zoë")["rougeL_f1"] == 1


@pytest.mark.checks(area="Text", given="a true answer without any word, such as ?!",
                    then="its ROUGE is null, not 0")
def test_an_answer_without_words_has_no_rouge():
    assert rouge_row(None, "?!", "?!")["rougeL_recall"] is None and rouge_row(None, "🐟", "🐟")["rougeL_recall"] is None


# pieces


@pytest.mark.checks(area="Text", given="a long text whose cut into pieces falls within a character",
                    then="the cut moves to the border of a character")
@pytest.mark.parametrize("size", [3, 4, 5, 7, 16])
def test_pieces_do_not_cut_characters(size):
    enc = Encoder(
        train_tokenizer(["ascii only"], 300), PROMPTS["plain"], max_length=size
    )  # every other character is several tokens
    pieces = chunk(enc, [JAPANESE * 3 + "a \ufffd of its own"])
    assert "".join(pieces) == JAPANESE * 3 + "a \ufffd of its own"


def test_pieces_of_ascii_are_cut_where_they_were():
    texts = ["The river runs to the sea; the bridge stands over it. "] * 9
    enc = Encoder(train_tokenizer(texts, 300), PROMPTS["plain"], max_length=16)
    ids = enc.tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    assert chunk(enc, texts) == enc.tokenizer.batch_decode([ids[i : i + 16] for i in range(0, len(ids), 16)])


@pytest.mark.checks(area="Text", given="own text to be continued, in any script",
                    then="neither its first half nor what should follow begins or ends within a character")
def test_halves_of_own_texts_do_not_cut_characters(own, tmp_path):
    own(forget_txt=JAPANESE * 4, retain_txt=JAPANESE)
    enc = Encoder(train_tokenizer(["ascii only"], 300), PROMPTS["plain"], max_length=30)
    asked = Own(str(tmp_path)).prompts("forget", enc)
    texts = [enc.tokenizer.decode(ids) for ids in asked.ids] + asked.reference_answers
    assert len(asked.reference_answers) > 2 and not any("\ufffd" in text for text in texts)


# tables


@pytest.mark.checks(area="Text", given="a document of more than 131,072 characters in one cell of a CSV file",
                    then="it is read whole")
def test_a_long_cell_is_read(own):
    import csv

    text, limit = "The river runs. " * 9000, csv.field_size_limit()
    assert own(forget_csv=f'text\n"{text}"\n') == [{"text": text}] and csv.field_size_limit() == limit


@pytest.mark.checks(area="Text", given="a double quote in a CSV file that is never closed, or closed in another row",
                    then="one sentence names the line in which its row begins")
@pytest.mark.parametrize("rows", ['a,b\nc,"d\ne,f\n', 'a,b\nc,"d\ne,"f"\n', 'a,b\nc,"d" and more\n'])
def test_a_stray_quote_is_said(own, rows):
    with pytest.raises(OpenUnlearnError, match="begins in line 3 .* double quote is missing"):
        own(forget_csv=f"question,answer\n{rows}")


@pytest.mark.checks(area="Text", given="a quoted text of several lines that look like rows",
                    then="a note asks whether a quote is missing")
def test_lines_that_look_like_rows_are_told(own):
    with pytest.warns(UserWarning, match="Row 0 .*line 2.* 2 of which look like rows"):
        assert len(own(forget_csv='question,answer\na,"b\nc,d\ne,f"\n')) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert own(forget_csv='question,answer\na,"A poem, of lines,\nhas commas, as prose has, of 1,000 words."\n')


@pytest.mark.checks(area="Text", given="two columns of one name",
                    then="one sentence names it")
def test_a_column_twice_is_refused(own):
    with pytest.raises(OpenUnlearnError, match="names answer twice"):
        own(forget_csv="question,answer,Answer\na,b,c\n")


@pytest.mark.checks(area="Text", given="two columns of one name in a benchmark's folder",
                    then="one sentence names it")
def test_a_column_twice_is_refused_in_benchmark_folders(tmp_path):
    (tmp_path / "qa.csv").write_text("question,answer,answer\na,b,c\n")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: qa\n  data_files: qa.csv\n---\n")
    with pytest.raises(OpenUnlearnError, match="'answer' twice"):
        check_rows(load_rows(str(tmp_path), "qa"), {"question": str, "answer": str}, "qa")


@pytest.mark.checks(area="Text", given="an object of JSON data that names something twice",
                    then="one sentence names the line and the name")
def test_a_name_twice_in_json_is_refused(own):
    with pytest.raises(OpenUnlearnError, match="Line 2 .* 'text' twice"):
        own(forget_jsonl='{"text": "a"}\n{"text": "b", "text": "c"}\n')


@pytest.mark.checks(area="Text", given="half of a character (a lone surrogate) in data",
                    then="one sentence names row and column")
def test_a_lone_surrogate_is_refused(own):
    with pytest.raises(OpenUnlearnError, match="Row 1 .*answer.* half of a character"):
        own(forget_jsonl='{"question": "a", "answer": "b"}\n{"question": "a", "answer": "the \\ud83d fish"}\n')


@pytest.mark.checks(area="Text", given="a question or answer of blanks",
                    then="one sentence names row and column, in every loader")
@pytest.mark.parametrize("blank", ["", "  \t", "\u3000", "\u200b"])
def test_an_answer_of_blanks_is_refused(own, blank):
    with pytest.raises(OpenUnlearnError, match="Row 0 .*'answer'; a text that says something"):
        own(forget_jsonl=json.dumps({"question": "a", "answer": blank}))
    with pytest.raises(OpenUnlearnError, match="Row 0 of x .*a text that says something"):
        check_rows([{"perturbed_answer": ["b", blank]}], {"perturbed_answer": list}, "x")


@pytest.mark.checks(area="Text", given="a question or answer of blanks in a folder shaped like TOFU or MUSE",
                    then="one sentence names row and column")
def test_blanks_are_refused_by_the_benchmarks(tmp_path):
    from openunlearn_nb.data.muse_rows import load_muse
    from openunlearn_nb.data.tofu import load_tofu

    write_folder(
        tmp_path,
        {
            "forget01": {"train": [{"question": "a", "answer": " "}]},
            "knowmem": {"forget_qa": [{"question": " ", "answer": "a"}]},
            "raw": {"forget": [{"text": "a"}, {"text": " "}]},
        },
    )
    for load in (
        lambda: load_tofu("forget01", str(tmp_path)),
        lambda: load_muse("knowmem", "forget_qa", data=str(tmp_path)),
    ):
        with pytest.raises(OpenUnlearnError, match="Row 0 .*a text that says something"):
            load()
    assert len(load_muse("raw", "forget", data=str(tmp_path))) == 2  # MUSE-News has an empty document


@pytest.mark.checks(area="Text", given="WMDP's corpus with a lone surrogate, or without the column text",
                    then="one sentence names line or row")
def test_wmdps_corpus_is_checked(tmp_path):
    from openunlearn_nb.data.wmdp import read_texts

    file = tmp_path / "bio-forget-corpus.jsonl"
    file.write_text('{"text": "a"}\n{"text": "\\udc1f"}\n')
    with pytest.raises(OpenUnlearnError, match="Line 2 .*half of a character"):
        read_texts(file)
    file.write_text('\n\n{"text": "a"}\n\n{"title": "b"}\n')
    with pytest.raises(OpenUnlearnError, match="Line 5 "):  # of the file, its empty lines counted
        read_texts(file)


@pytest.mark.checks(area="Text", given="a text file that begins with a bracket, as [Chapter 1] does",
                    then="it is one text and no list of JSON")
def test_a_text_file_may_begin_with_a_bracket(tmp_path):
    from openunlearn_nb.data.custom import Own

    (tmp_path / "forget.txt").write_text("[Chapter 1] The tower was rebuilt.")
    (tmp_path / "retain.txt").write_text("[1] A note.")
    own = Own(str(tmp_path))
    assert [own.rows(side)[0]["text"] for side in ("forget", "retain")] == ["[Chapter 1] The tower was rebuilt.", "[1] A note."]


@pytest.mark.checks(area="Text", given="alternates with a line separator (U+2028) within an answer",
                    then="they are read back")
def test_alternates_may_hold_any_line_separator(tmp_path):
    from openunlearn_nb.experiments.alternates import read_alternates, write_alternates

    file = write_alternates(tmp_path / "a.jsonl", [("Who?", "Mara")], [["Orla\u2028Tam\x85"]])
    assert read_alternates(file, ["Who?"]) == [["Orla\u2028Tam\x85"]]


@pytest.mark.checks(area="Text", given="an answer whose characters are several tokens, token by token in a notebook",
                    then="each character stands whole with its last token")
def test_tokens_of_a_character_are_shown_as_one():
    from openunlearn_nb.reporting.explore import _texts

    enc = Encoder(train_tokenizer(["ascii only"], 300), PROMPTS["plain"], max_length=64)
    ids = enc.tokenizer("a 川 🐟 \ufffd.", add_special_tokens=False)["input_ids"]
    texts = _texts(enc, ids)
    assert (
        len(texts) == len(ids)
        and "".join(texts) == enc.tokenizer.decode(ids)
        and {"川", "🐟"} <= {text.strip() for text in texts}
    )
