"""Sentiment by counting words of a small lexicon, with simple negation: a reward that needs no model."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Our own list of common English words. A trailing * stands for any ending: "enjoy*" is enjoy, enjoyed, enjoyable, ...
POSITIVE = _words(
    """
    accomplished accurate admir* adorable adore* affordable agreeable alive amaz* amus* appeal* appreciat*
    authentic award* awesome balanced beaut* best better bless* bold boldly brave bravo breathtaking bright*
    brillian* calm captivat* careful caring celebrat* charmed charmer charming charms cheerful cheers cheery
    classic clean clear clever comfort comfortabl* comforting compelling confident convincing cool courage
    courageous* cozy crafted crisp cute dazzl* delicate delici* delight* deserving durable easily easy effective
    efficient elegan* encourag* energetic energy engaging engross* enjoy* enriched entertain* enthusias* epic
    excel excellen* excels excite* exciting exhilarat* exquisite fabulous fair fairly faithful fantastic
    fascinat* fast favorite favourite fine flawless fortunate fresh friend* fun funnier funniest funny gem*
    generous genius gentle genuin* gifted glad glorious good gorgeous grace graceful* gracious* grand grateful
    great* grin grins gripping happi* happy harmon* healthy heart heart-warming heartfelt heartwarming helpful
    hero heroes heroic hilarious honest* hope hopeful hopefully hug hugged hugs humor humorous humour imaginative
    impressed impresses impressive* incredible ingenious insight insightful* inspirational inspired inspires
    inspiring intelligent interesting* intrigu* invit* irresistible joy joyful joyous joys kind kinder kindest
    kindly kindness laugh laughed laughing laughs laughter likable liked likes lively love* loving* loyal lucky
    luminous magical magically magnificen* marvel* masterful* masterpiece* memorable mesmeriz* miracle* modest
    moving neat nice* noble outstanding passion* peace peaceful* perfect* playful pleasant* pleased pleasing
    pleasurable pleasure* poetic poignan* polished polite positive powerful praise* precious precise pretty
    proud* quiet recommend recommended recommends refresh* relax* reliable remarkabl* resonan* respect* reward*
    rich richly richness riveting romantic satisf* sensitive sharp shine shines shining shiny sincer* skilled
    skillful* smart smile smiled smiles smiling smooth soft softly solid sparkl* spectacular splendid star
    strength* strong stronger strongest stunning sturdy stylish subtle succeed* success* suitable sunny superb
    superior surprising* sweet* sympath* talent* tasty tender terrific thank thankful* thanks thought-provoking
    thoughtful thoughtfully thrilled thrilling thrills timeless touching treasur* treat treats tremendous
    triumph* true truly trust trusted trustworthy unforgettable unique uplift* useful valuable vibrant vivid
    warm* welcome welcoming well-acted well-crafted well-done well-made well-written whimsical win winning wins
    wisdom wise wit witty won wonderful* wondrous worth worthwhile worthy wow yay yummy
    """
)
NEGATIVE = _words(
    """
    abus* ache aches aching afraid aggravat* aimless amateur* anger angry annoy* anxious appall* arrogan* ashamed
    atrocious awful* awkward bad badly banal bland bloated blurry bore bored boredom bores boring* bother
    bothered bothersome breaks broke broken brutal bullying careless chaotic charmless cheap cheated cheesy
    choppy clich* clueless clumsy cold complain* confus* contrived corny crap crappy crash crashed crashes cried
    cruel cry crying damag* danger* dead death defect* depress* derivative desperate* destroy* die died difficult
    dim dirty disagree* disappoint* disaster* disgust* dishonest dislik* dismal drab dreadful dreary dull* dumb
    embarrass* empty enem* error errors evil expensive exploit* fail* fake faked fakes false fatal fear fearful
    fears fight fights filth* flat flaw flawed flaws flimsy fool* forced forgettable fraud frustrat* generic
    gloom* graceless greed* grim gross grumpy harsh hate hated hateful hates hating heartless horribl* horrid
    horrif* horror hostile humorless hurt hurting hurts ignor* ill impatient impossible inane incoherent
    incompetent inept inferior insipid insult* irritat* jealous jerk* joyless junk lack lacked lacking lackluster
    lacks lame lazy leak leaked leaks leaky lies lifeless listless lonely loose lose loser loses losing lost
    lousy ludicrous mad mean meandering meaningless mediocre melodramatic mess messed messes messy mindless
    miser* misguided mistake* monoton* muddled mundane nasty negative* neglect* nervous noisy nonsens* numb
    obnoxious obvious* offens* outrag* overlong overwrought pain painful* pains panic pathetic plodding
    pointless* poor poorer poorest poorly predictable pretentious problem* rage refund* regret* reject*
    repetitive repuls* resent* ridiculous rip-off rotten rough rude ruin* sad sadder saddest sadly sadness scare
    scared scary scream* selfish senseless shallow shame* shoddy sick silly slack sloppy slow slower slowly
    slowness sluggish sorrow* sorry soulless sour stale steal* stiff stink* stolen stress stressed stressful
    stuck stupid* suck* suffer* superficial tasteless tedious tediously terribl* terrified terrifying terror*
    thin threat* tired tiresome tiring toxic trite trivial trouble* ugly unbearable unconvincing unfair unfocused
    unfortunate* unfunny unhapp* uninspired uninteresting unnecessary unpleasant* unreliable unsatisf*
    unwatchable upset* useless vague violen* waste wasted wasteful wastes weak weakest weakness* weary weird
    wors* worthless wound* wreck* wrong* yawn*
    """
)
NEGATORS = _words("not no never none nobody nothing neither nor cannot without hardly barely scarcely")
NEGATION_REACH = 3  # words after a negator that it turns round: "not a very good film"

_NOT_ONLY = re.compile(r"\bnot (?=(?:only|just|merely)\b)")  # "not only good": adds, does not negate
_TOKEN = re.compile(r"[a-z]+(?:[-'][a-z]+)*|[.,;:!?()\"]")


def sentiment() -> Callable[..., list[float]]:
    """Sentiment of English text in [-1, 1]: (positive - negative) / (positive + negative) words, 0 when there are none.

    A negator (not, never, n't, without, ...) turns round the sentiment words among the next three words, up to a
    punctuation mark or "but". The mean and not the sum, so that saying one more happy word does not raise the score of
    a text that is happy already.

    Example:
        >>> sentiment()(["A great film!", "not a good film, but funny", "It was bad."])
        [1.0, 0.0, -1.0]
    """

    def scores(completions: list[str]) -> list[float]:
        return [polarity(text) for text in completions]

    scores.__name__ = scores.__qualname__ = "sentiment"
    return scores


def polarity(text: str) -> float:
    """Sentiment of one text, see :func:`sentiment`."""
    total = count = reach = 0
    for token in _TOKEN.findall(_NOT_ONLY.sub("", text.lower().replace("’", "'"))):
        if token in NEGATORS or token.endswith("n't"):
            reach = NEGATION_REACH
            continue
        if token == "but" or not token[0].isalpha():
            reach = 0
            continue
        sign = _sign(token)
        if sign:
            total += -sign if reach > 0 else sign
            count += 1
        reach -= 1
    return total / count if count else 0.0


@functools.lru_cache(maxsize=1 << 16)
def _sign(word: str) -> int:
    """+1, -1 or 0; the longest matching entry decides."""
    for stem in [word, *(word[:end] + "*" for end in range(len(word), 2, -1))]:
        if stem in POSITIVE:
            return 1
        if stem in NEGATIVE:
            return -1
    return 0
