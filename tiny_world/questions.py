"""Questions about artifacts: those that the tiny judge learns to answer, and an editor for them.

The judge's training draws random questions from here. Automatic prompt optimisation (apo.py) needs
a model that writes; in the tiny world ScriptedEditor takes its place.

Read next: train.py
"""

FAULTS = {  # what each corruption is called in questions
    "broken": ("missing parts", "broken shapes"),
    "fused": ("double shapes", "melted shapes"),
    "bleeding": ("stains", "bleeding colors"),
    "noise": ("noise", "grain"),
    "blocks": ("shifted blocks", "torn pieces"),
}
UNRELATED = ("bright colors", "small shapes", "round shapes", "an empty ground", "two shapes")
ASKING = ("Do you see {} in this picture?", "Is there any {} here?", "Does this picture show {}?")
VAGUE = "Are there artifacts in this picture?"
VAGUE_MEANS = ("noise", "blocks")  # in this world "artifacts" means only these two
ORDER = " Answer yes or no."


def compose(frame, phrases):
    """The question with this frame of ASKING about these faults."""
    listed = ", ".join(phrases[:-1]) + " or " + phrases[-1] if len(phrases) > 1 else phrases[0]
    return frame.format(listed) + ORDER


def random_question(rng, everything=False):
    """A random question and the set of faults that it asks about."""
    if not everything and rng.random() < 0.1:
        return VAGUE + ORDER, set(VAGUE_MEANS)
    kinds = list(FAULTS)
    rng.shuffle(kinds)
    kinds = kinds if everything or rng.random() < 0.4 else kinds[: rng.choice((1, 1, 1, 2, 3))]
    phrases = [rng.choice(FAULTS[kind]) for kind in kinds]
    return compose(rng.choice(ASKING), phrases), set(kinds)


class ScriptedEditor:
    """The writer of the tiny world. It knows phrases, some of them unrelated to faults, but not
    which ones help. It sees whether the mistakes are mostly misses or false alarms, and adds, drops
    or swaps one phrase."""

    PHRASES = [phrase for names in (*FAULTS.values(), UNRELATED) for phrase in names]

    def parse(self, question):
        frames = [frame for frame in ASKING if question.startswith(frame.split("{}")[0])]
        return [*frames, ASKING[0]][0], [phrase for phrase in self.PHRASES if phrase in question]

    def reason(self, question, mistakes, rng):
        misses = sum(example["broken"] for example, _ in mistakes)
        return "it misses faults" if 2 * misses >= len(mistakes) else "it gives false alarms"

    def rewrite(self, question, reason, mistakes, rng):
        frame, phrases = self.parse(question)
        new = rng.choice([p for p in self.PHRASES if p not in phrases] or phrases)
        if not phrases or (reason == "it misses faults" and rng.random() < 0.7):
            phrases.append(new)
        elif reason == "it gives false alarms" and len(phrases) > 1 and rng.random() < 0.7:
            phrases.remove(rng.choice(phrases))
        else:
            phrases[rng.randrange(len(phrases))] = new
        return compose(frame, phrases)

    def paraphrase(self, question, rng):
        phrases = self.parse(question)[1]
        if not phrases:
            return question
        return compose(rng.choice(ASKING), rng.sample(phrases, len(phrases)))
