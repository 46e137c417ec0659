"""Languages as clients write them, and as the contracts print them.

Inside the library a language is its ISO 639-1 code, or its 639-3 code where 639-1 has none.
"""

from __future__ import annotations

import re

# 639-1 (or 639-3) code, 639-3 code, English name as Whisper spells it.
_TABLE = """
aa aar afar; ab abk abkhazian; ae ave avestan; af afr afrikaans; ak aka akan; am amh amharic; an arg aragonese;
ar ara arabic; as asm assamese; av ava avaric; ay aym aymara; az aze azerbaijani; ba bak bashkir; be bel
belarusian; bg bul bulgarian; bi bis bislama; bm bam bambara; bn ben bengali; bo bod tibetan; br bre breton; bs
bos bosnian; ca cat catalan; ce che chechen; ch cha chamorro; co cos corsican; cr cre cree; cs ces czech; cu chu
church slavic; cv chv chuvash; cy cym welsh; da dan danish; de deu german; dv div divehi; dz dzo dzongkha; ee
ewe ewe; el ell greek; en eng english; eo epo esperanto; es spa spanish; et est estonian; eu eus basque; fa fas
persian; ff ful fulah; fi fin finnish; fj fij fijian; fo fao faroese; fr fra french; fy fry western frisian; ga
gle irish; gd gla scottish gaelic; gl glg galician; gn grn guarani; gu guj gujarati; gv glv manx; ha hau hausa;
he heb hebrew; hi hin hindi; ho hmo hiri motu; hr hrv croatian; ht hat haitian creole; hu hun hungarian; hy hye
armenian; hz her herero; ia ina interlingua; id ind indonesian; ie ile interlingue; ig ibo igbo; ii iii sichuan
yi; ik ipk inupiaq; io ido ido; is isl icelandic; it ita italian; iu iku inuktitut; ja jpn japanese; jv jav
javanese; ka kat georgian; kg kon kongo; ki kik kikuyu; kj kua kuanyama; kk kaz kazakh; kl kal kalaallisut; km
khm khmer; kn kan kannada; ko kor korean; kr kau kanuri; ks kas kashmiri; ku kur kurdish; kv kom komi; kw cor
cornish; ky kir kyrgyz; la lat latin; lb ltz luxembourgish; lg lug ganda; li lim limburgan; ln lin lingala; lo
lao lao; lt lit lithuanian; lu lub luba-katanga; lv lav latvian; mg mlg malagasy; mh mah marshallese; mi mri
maori; mk mkd macedonian; ml mal malayalam; mn mon mongolian; mr mar marathi; ms msa malay; mt mlt maltese; my
mya myanmar; na nau nauru; nb nob norwegian bokmål; nd nde north ndebele; ne nep nepali; ng ndo ndonga; nl nld
dutch; nn nno nynorsk; no nor norwegian; nr nbl south ndebele; nv nav navajo; ny nya chichewa; oc oci occitan;
oj oji ojibwa; om orm oromo; or ori odia; os oss ossetian; pa pan punjabi; pi pli pali; pl pol polish; ps pus
pashto; pt por portuguese; qu que quechua; rm roh romansh; rn run rundi; ro ron romanian; ru rus russian; rw kin
kinyarwanda; sa san sanskrit; sc srd sardinian; sd snd sindhi; se sme northern sami; sg sag sango; sh hbs
serbo-croatian; si sin sinhala; sk slk slovak; sl slv slovenian; sm smo samoan; sn sna shona; so som somali; sq
sqi albanian; sr srp serbian; ss ssw swati; st sot southern sotho; su sun sundanese; sv swe swedish; sw swa
swahili; ta tam tamil; te tel telugu; tg tgk tajik; th tha thai; ti tir tigrinya; tk tuk turkmen; tl tgl
tagalog; tn tsn tswana; to ton tongan; tr tur turkish; ts tso tsonga; tt tat tatar; tw twi twi; ty tah tahitian;
ug uig uyghur; uk ukr ukrainian; ur urd urdu; uz uzb uzbek; ve ven venda; vi vie vietnamese; vo vol volapük; wa
wln walloon; wo wol wolof; xh xho xhosa; yi yid yiddish; yo yor yoruba; za zha zhuang; zh zho chinese; zu zul
zulu; haw haw hawaiian; yue yue cantonese; fil fil filipino; ast ast asturian; ceb ceb cebuano; kea kea
kabuverdianu; ckb ckb sorani; nso nso northern sotho; umb umb umbundu; luo luo luo; gsw gsw swiss german; kam
kam kamba
"""
# Codes that were replaced, bibliographic 639-2 codes, and other names in common use.
_ALIASES = {
    "iw": "he", "in": "id", "ji": "yi", "jw": "jv", "mo": "ro", "cmn": "zh", "arb": "ar", "swh": "sw", "tgl": "tl",
    "pes": "fa", "nob": "nb", "alb": "sq", "arm": "hy", "baq": "eu", "bur": "my", "chi": "zh", "cze": "cs", "dut": "nl",
    "fre": "fr", "geo": "ka", "ger": "de", "gre": "el", "ice": "is", "mac": "mk", "mao": "mi", "may": "ms", "per": "fa",
    "rum": "ro", "slo": "sk", "tib": "bo", "wel": "cy",
    "mandarin": "zh", "castilian": "es", "flemish": "nl", "burmese": "my", "moldavian": "ro", "farsi": "fa",
    "valencian": "ca", "haitian": "ht", "letzeburgesch": "lb", "pushto": "ps", "panjabi": "pa", "sinhalese": "si",
    "norwegian nynorsk": "nn", "norwegian bokmal": "nb", "modern greek": "el",
}  # fmt: skip

_NAMES: dict[str, str] = {}
_CODES: dict[str, str] = {}
for _row in _TABLE.replace("\n", " ").split(";"):
    _code, _three, _name = _row.split(maxsplit=2)
    _NAMES[_code] = " ".join(_name.split())
    _CODES |= {_code: _code, _three: _code, _NAMES[_code]: _code}
_CODES |= _ALIASES


def parse(text: str) -> str | None:
    """The code of a language given as a code, a tag with a region or script (`en-US`, `zh_Hant`),
    or an English name; None where it is no known language."""
    lowered = " ".join(text.strip().lower().split())
    if lowered in _CODES:
        return _CODES[lowered]
    tag = re.fullmatch(r"([a-z]{2,3})(?:[-_][a-z0-9]{1,8})+", lowered)
    return _CODES.get(tag[1]) if tag else None


def name(code: str) -> str:
    """The English name in lower case, as OpenAI prints it; the code itself where none is known."""
    return _NAMES.get(code, code)
