"""Measures of text in scripts without spaces, with accents and with vowel signs.

All texts were written for these tests.
"""

from __future__ import annotations

import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics.bleu import BLEU

from workbench.judges import overlap, text_quality
from workbench.judges.overlap import bleu, rouge_l
from workbench.judges.text_quality import (
    distinct_n,
    is_degenerate,
    load_encoder,
    longest_loop,
    relevance,
    repetition,
    word_count,
    words,
)

PROSE = {
    "zh": "做面包需要面粉、水、盐和时间。先把面粉和水混合，再加入一点盐，揉成光滑的面团。"
    "把面团放在温暖的地方，让它发酵一个小时，直到体积变成原来的两倍。然后把面团折叠两次，"
    "放进模具里，再等半个小时。烤箱预热到二百二十度，烤三十五分钟左右。烤好以后，敲一敲底部，"
    "如果声音是空的，说明面包已经熟了。最后把面包放在架子上晾凉，等完全冷却以后再切片。"
    "如果想让外皮更脆，可以在烤箱里放一小碗热水，蒸汽会让表皮变薄。剩下的面包用布包好，"
    "第二天仍然很好吃，也可以切片冷冻，吃的时候直接放进烤面包机。",
    "ja": "パンを作るには、小麦粉と水と塩、そして時間が必要です。まず小麦粉と水をよく混ぜ、"
    "塩を少し加えて、なめらかになるまでこねます。生地を暖かい場所に置いて、一時間ほど発酵させて"
    "ください。二倍の大きさになったら、二回折りたたみ、型に入れて、さらに三十分待ちます。"
    "オーブンを二百二十度に温め、三十五分ほど焼きます。底をたたいて、軽い音がすれば焼き上がりです。"
    "網の上で冷まし、完全に冷めてから切りましょう。皮をぱりっとさせたいときは、熱いお湯を入れた"
    "小さな器を一緒に入れると、蒸気で皮が薄くなります。残ったパンは布で包めば、次の日もおいしく"
    "食べられます。",
    "th": "การทำขนมปังต้องใช้แป้ง น้ำ เกลือ และเวลา ขั้นแรกผสมแป้งกับน้ำให้เข้ากัน "
    "แล้วเติมเกลือเล็กน้อย "
    "นวดจนเนื้อแป้งเนียน จากนั้นวางไว้ในที่อุ่นประมาณหนึ่งชั่วโมงจนก้อนแป้งโตเป็นสองเท่า "
    "พับแป้งสองครั้ง "
    "ใส่ลงในพิมพ์แล้วรออีกครึ่งชั่วโมง เปิดเตาอบที่สองร้อยยี่สิบองศา "
    "อบราวสามสิบห้านาที เคาะที่ก้นขนมปัง "
    "ถ้าได้ยินเสียงโปร่งแสดงว่าสุกแล้ว วางบนตะแกรงให้เย็นก่อนหั่น ถ้าอยากให้เปลือกกรอบ "
    "ให้วางถ้วยน้ำร้อนเล็ก ๆ ไว้ในเตา ไอน้ำจะช่วยให้เปลือกบาง "
    "ขนมปังที่เหลือห่อด้วยผ้า วันรุ่งขึ้นก็ยังอร่อย",
    "vi": "Làm bánh mì cần bột, nước, muối và thời gian. "
    "Trước hết trộn bột với nước, thêm một ít muối "
    "rồi nhào đến khi khối bột mịn. Để bột ở nơi ấm chừng "
    "một giờ cho nở gấp đôi. Gấp bột hai lần, cho "
    "vào khuôn và đợi thêm nửa giờ nữa. Làm nóng lò đến "
    "hai trăm hai mươi độ, nướng khoảng ba mươi lăm "
    "phút. Gõ vào đáy bánh, nếu nghe tiếng vang nhẹ "
    "là bánh đã chín. Để nguội trên giá rồi mới cắt.",
    "hi": "रोटी बनाने के लिए आटा, पानी, नमक और समय चाहिए। "
    "पहले आटे में पानी मिलाइए, थोड़ा नमक डालिए और "
    "अच्छी तरह गूँथिए। आटे को गरम जगह पर एक घंटा रखिए, "
    "जब तक वह दुगना न हो जाए। फिर उसे दो बार मोड़िए "
    "और साँचे में रखकर आधा घंटा और रुकिए। तेज़ आँच पर पैंतीस मिनट सेंकिए और ठंडा होने पर काटिए।",
    "ko": "빵을 만들려면 밀가루와 물, 소금, 그리고 시간이 "
    "필요합니다. 먼저 밀가루에 물을 붓고 소금을 조금 "
    "넣은 뒤 반죽이 매끄러워질 때까지 치댑니다. 따뜻한 곳에 "
    "한 시간쯤 두어 두 배로 부풀게 하세요. 두 번 접어 "
    "틀에 넣고 삼십 분을 더 기다립니다. 오븐에서 서른다섯 "
    "분 정도 굽고, 완전히 식은 다음에 썰어 드세요.",
}
PHRASES = {
    "zh": "先把水烧开，",
    "ja": "水を沸かして、",
    "th": "ต้มน้ำให้เดือดก่อนแล้ว ",
    "vi": "rồi đun sôi nước, ",
    "hi": "पानी को उबालिए और ",
    "ko": "물을 먼저 끓이고 ",
}


@pytest.mark.parametrize("language", PROSE)
def test_prose_in_any_script_is_not_degenerate_and_a_loop_is(language):
    assert is_degenerate(PROSE[language]) == (False, "")
    assert is_degenerate(PROSE[language] + PHRASES[language] * 20)[0]
    assert is_degenerate(PHRASES[language] * 20)[0]


@pytest.mark.parametrize("language", PROSE)
def test_long_prose_in_any_script_is_not_degenerate(language):
    """Sentences of many texts in a row: letters come again, words do not loop."""
    sentences = [
        s for s in PROSE[language].replace("。", "。|").replace(". ", ". |").split("|") if s
    ]
    random.Random(0).shuffle(sentences)
    text = PROSE[language] + " ".join(sentences[: len(sentences) // 2])
    assert is_degenerate(text)[0] is False, is_degenerate(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("你好 ok", ["你", "好", "ok"]),
        ("人々の𠮷野家", ["人", "々", "の", "𠮷", "野", "家"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("việc này", ["việc", "này"]),
        ("مَرْحَبًا بك", ["مَرْحَبًا", "بك"]),
        ("می‌خواهم", ["می‌خواهم"]),
        ("한국어 텍스트", ["한국어", "텍스트"]),
        ("l'été d’Anna", ["l'été", "d’anna"]),
        ("3.5 km²", ["3", "5", "km²"]),
    ],
)
def test_marks_belong_to_their_letter_and_letters_without_spaces_are_words(text, expected):
    assert words(text) == [unicodedata.normalize("NFC", word) for word in expected]
    assert words(unicodedata.normalize("NFD", text)) == words(text)


def test_thai_letters_are_counted_as_parts_of_words():
    assert word_count("กข" * 20) == 10
    assert word_count("ก") == 1
    assert longest_loop("นกแกตม" * 6) == 9  # 36 letters
    assert repetition("กขคง" * 8) == pytest.approx(1 - 4 / 32)
    assert distinct_n(PROSE["th"], 2) > 0.9
    assert repetition(PROSE["th"]) < 0.1


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=200))
def test_rouge_cuts_ascii_as_rouge_score_does(text):
    assert overlap._RougeTokens().tokenize(text) == DefaultTokenizer().tokenize(text)


@pytest.mark.parametrize("language", PROSE)
def test_overlap_is_full_with_itself_and_part_with_a_part(language):
    text = PROSE[language]
    half = text[: len(text) // 2]
    assert rouge_l([text], [text]) == pytest.approx([1.0])
    assert bleu([text], [text]) == pytest.approx([100.0])
    assert 0.5 < rouge_l([text], [half])[0] < 0.8
    assert 20 < bleu([text], [half])[0] < 60
    other = PROSE["ko" if language != "ko" else "zh"]
    assert rouge_l([text], [other])[0] < 0.1


def test_bleu_of_chinese_is_sacrebleus_own():
    texts = ["猫坐在垫子上看书。", "今天天气很好，我们去公园散步吧。"]
    references = ["猫坐在椅子上看书。", "今天天气不错，我们去公园玩吧。"]
    metric = BLEU(effective_order=True, tokenize="zh")
    expected = [
        metric.sentence_score(text, [reference]).score
        for text, reference in zip(texts, references, strict=True)
    ]
    assert bleu(references, texts) == pytest.approx(expected)


def test_the_default_encoder_scores_english_only_and_another_all():
    if text_quality._packaged_encoder() is None:
        pytest.skip("the package with the sentence encoder is not installed")
    prompts = ["How do I bake a loaf of bread?", "怎么做面包？", "怎么做面包？", "Why?"]
    answers = ["Mix flour and water, then bake it.", PROSE["zh"], "Mix flour and water.", "42"]
    default = relevance(prompts, answers)
    assert [value is None for value in default] == [False, True, True, False]
    assert relevance(prompts, answers, load_encoder()) == default

    class Multilingual:
        def encode(self, texts, **options):
            return load_encoder().encode(texts, **options)

    assert None not in relevance(prompts, answers, Multilingual())
