"""What can happen in a tale, and how one says it: the table that generator and checker share.

An event has roles, capital letters: A B are persons, T U things, X an animal, P a place with a
name, V W any places (home too), C a colour. `needs` says what must hold before, `then` what holds
afterwards, in facts such as "A has T":

    A has T, not T broken       facts that hold, and facts that do not; * stands for anything
    A with B                    both are at one place
    calm                        nothing is left open (OPEN below); "calm but lost" excepts some
    no A has T                  (in `then`) the fact ends

A role that no need binds is new to the tale; a place may also be one that was named before.

`ways` are the sentences. {A} is a name or he, {A:him} and {A:his} likewise, {A:name} always the
name, {A:kid} boy or girl; {T} is "the kite", "the red kite" or "it", {T:a} "a red kite", {T:the}
"the kite", {T:full} "red kite", {T:noun} "kite", {T:use} what one does with it; {P:at} is "in the
barn", {P:to} "to the barn", {P:the} "the barn"; {X} "the dog", {X:noun} "dog"; {AB} "Tom and Lily"
or "they". `moods` are feelings that the event causes: "ROLE mood ...: why".
"""
import re
from dataclasses import dataclass

from data.tales_world import MOOD_FRAMES, MOODS


@dataclass(frozen=True, eq=False)
class Event:
    """One kind of event, a row of the table; kind: opening, intro, quiet, plot, side or end."""
    name: str
    kind: str
    needs: str
    then: str
    ways: tuple
    moods: tuple = ()
    weight: float = 1.0


# Facts that last only until the next event: a feeling or thanks come at once or not at all.
FRESH = {"feels", "owes"}
# What must be answered at once, before anything else happens.
URGENT = {"asked", "bids", "begged", "accused", "idea", "ready"}
# What an ordinary ending must not leave open.
OPEN = {"bare", "wants", "refused", "lost", "broken", "took", "wronged", "lent", "promised",
        "vowed", "birthday", "stuck", "hid", "snatched", "found"} | URGENT

OPENINGS = (
    Event("fair", "opening", "start", "no start, fair", (
        "It was a sunny morning.",
        "The sun was shining.",
        "It was a warm day in spring.",
        "The birds were singing in the trees.",
        "It was the first day of summer.",
        "There was not a cloud in the sky.")),
    Event("windy", "opening", "start", "no start, windy", (
        "A strong wind was blowing.",
        "It was a windy day.",
        "The wind was blowing around the houses.",
        "It was autumn, and the wind was strong.",
        "All the trees were bending in the wind.")),
    Event("rainy", "opening", "start", "no start, rainy", (
        "It was raining.",
        "It had rained all night.",
        "Dark clouds hung over the village.",
        "It was a wet and grey day.",
        "Rain was falling on the roofs.")),
)

INTRODUCTIONS = (
    Event("once", "intro", "start, nobody", "no start, no nobody, A person, A bare, A at home", (
        "Once upon a time there was a {A:kid} called {A:name}.",
        "There was once a {A:kid} called {A:name}.",
        "Long ago there lived a {A:kid} called {A:name}.",
        "This is the story of a {A:kid} called {A:name}.",
        "Once there was a little {A:kid} called {A:name}.")),
    Event("once_owner", "intro", "start, nobody",
          "no start, no nobody, A person, A at home, A has T, A owns T, A first T", (
        "Once upon a time there was a {A:kid} called {A:name}, who had {T:a}.",
        "There was once a {A:kid} called {A:name}, who loved {A:his} {T:full}.",
        "Once there was a {A:kid} called {A:name}, and {A} had {T:a}.",
        "There once was a little {A:kid} called {A:name} with {T:a}.",
        "Long ago there lived a {A:kid} called {A:name}, who had {T:a}."), weight=2),
    Event("outing", "intro", "nobody",
          "no start, no nobody, A person, A at P, A has T, A owns T, A first T", (
        "{A:name} was {P:at} with {A:his} {T:full}.",
        "A {A:kid} called {A:name} was sitting {P:at} with {T:a}.",
        "{A:name} had taken {A:his} {T:full} {P:to}.",
        "A little {A:kid} called {A:name} was playing {P:at} with {T:a}.",
        "{A:name} was walking {P:to} with {T:a} under {A:his} arm."), weight=3),
    Event("make", "intro", "A bare", "no A bare, A has T, A owns T, A first T", (
        "One day {A} made {T:a}.",
        "{A} made {T:a} with {A:his} own hands.",
        "{A} worked all morning and made {T:a}.",
        "{A} found some paper, string and glue and made {T:a}.",
        "{A:his} father showed {A:him} how to make {T:a}."),
        moods=("A proud: {A} had made {T} all alone",), weight=0.5),
    Event("buy", "intro", "A bare, A at home",
          "no A bare, A has T, A owns T, A first T", (
        "{A} had saved {A:his} money and bought {T:a}.",
        "One day {A} went to a shop and bought {T:a}.",
        "{A} bought {T:a} with {A:his} last money.",
        "{A} bought {T:a} from an old man.",
        "For three coins {A} bought {T:a}."),
        moods=("A glad: {T:the} was now {A:his} own",), weight=0.5),
    Event("visit", "intro", "A person, A at home, A owns T, not pair",
          "pair, B person, B at home", (
        "One day {A:his} friend {B:name} came to see {A:him}.",
        "Then somebody knocked at the door, and it was {A:his} friend {B:name}.",
        "In the afternoon {B:name} came to visit {A:him}.",
        "One morning {A:his} cousin {B:name} came to stay.",
        "On Sunday {A:his} cousin {B:name} came to play.")),
    Event("meet", "intro", "A person, A at P, A owns T, not pair", "pair, B person, B at P", (
        "{A} met {A:his} friend {B:name} {P:at}.",
        "{A:his} friend {B:name} was {P:at}, too.",
        "There {A} met {B:name}, who lived near {P:the}.",
        "A {B:kid} called {B:name} was {P:at} as well.",
        "Soon {B:name} came {P:to}, too."), weight=3),
    Event("second", "intro", "B wants T, A has T, A owns T, A with B, not two",
          "two, B has U, B owns U, B first U, B ready U", (
        "{B} had {U:a}.",
        "{B} had brought {U:a}.",
        "{B:name} was carrying {U:a}.",
        "{B} had {U:a} in {B:his} bag.",
        "{B:name} held {U:a} in {B:his} hands."), weight=3),
)

QUIET = (
    Event("go", "quiet", "A at home, A has T, A owns T, not pair, not happened",
          "no A at home, A at P", (
        "One day {A} took {T} {P:to}.",
        "{A} went {P:to} to {T:use} {T}.",
        "One morning {A} carried {T} {P:to}.",
        "{A} put {T} into a bag and walked {P:to}.",
        "In the morning {A} ran {P:to} with {T}."), weight=3),
)

WISHES = (
    Event("admire", "plot", "A has T, A owns T, A with B, calm, not B tried T, not B first T",
          "B wants T", (
        "{B} liked {T} at once.",
        "{B} thought that {T} was wonderful.",
        "{B} could not stop looking at {T}.",
        "\"What a fine {T:noun}!\" said {B:name}.",
        "{B} wanted to {T:use} {T}, too."), weight=6),
    Event("ask", "plot", "B wants T, A has T, A owns T, A with B, not T broken", "B asked A T", (
        "\"May I have {T:the} for a while?\" asked {B:name}.",
        "\"{A:name}, may I {T:use} {T:the}?\" asked {B:name}.",
        "{B} asked {A:him} for {T}.",
        "{B} asked {A:him} to lend {B:him} {T}.",
        "\"Please lend me {T:the},\" said {B:name} to {A:him}."), weight=9),
    Event("lend", "plot", "B asked A T",
          "no B asked A T, no B wants T, no A has T, B has T, A lent B T, B tried T, B owes A", (
        "\"Yes, of course,\" said {A:name} and gave {B:him} {T}.",
        "{A} was kind and lent {B:him} {T}.",
        "\"You may {T:use} it until tomorrow,\" said {A:name} to {B:him}.",
        "So {A} lent {T} to {B:him} for a while.",
        "\"Yes, but I want it back,\" said {A:name} and gave {T} to {B:him}."),
        moods=("B glad: now {B} could {T:use} {T}",), weight=7),
    Event("refuse", "plot", "B asked A T", "no B asked A T, no B wants T, A refused B T", (
        "\"No, {T:the} is mine,\" said {A:name}.",
        "But {A} did not want to lend {B:him} {T}.",
        "\"No, you will break it,\" said {A:name} to {B:him}.",
        "{A} said no and held {T} tight.",
        "But {A} would not give {B:him} {T}."),
        moods=("B sad angry: {A} had said no",), weight=3),
    Event("share_after_all", "plot", "A refused B T, A has T, A with B",
          "no A refused B T, A shared B T, B tried T", (
        "Then {A} felt sorry, and they shared {T}.",
        "\"We can share it,\" said {A:name} at last, and so they took turns with {T}.",
        "But it was dull to {T:use} {T} alone, and so {A} shared it with {B:him}.",
        "After a while {A} said: \"Come, {B:name}, we will {T:use} {T:the} together.\"",
        "At last {A} let {B:him} {T:use} {T} as well."), weight=1.5),
    Event("hide", "plot", "B wants T, A has T, A owns T, A with B, not T broken, not A at P",
          "no B wants T, A refused B T, no A has T, A hid T, T lies P", (
        "{A} hid {T} {P:at}, so that {B} could not take it.",
        "Then {A} went {P:to} and hid {T} there.",
        "So that {B} would not get {T}, {A} hid it {P:at}.",
        "{A} was afraid for {T} and hid it {P:at}.",
        "\"You will never find it,\" {A} told {B:him} and hid {T} {P:at}."), weight=1.5),
    Event("fetch", "plot", "A hid T, A refused B T, T lies P, A with B",
          "no A hid T, no A refused B T, no T lies P, A has T, A shared B T, B tried T", (
        "In the end {A} got {T} from its place {P:at} and shared it with {B:him}.",
        "But {T} was no use {P:at}, so {A} got it and shared it with {B:him}.",
        "Then {A} felt sorry, brought {T} back from {P:the} and let {B:him} {T:use} it.",
        "\"Come {P:to}, {T:the} is there,\" said {A:name} to {B:him} at last, and they shared it.",
        "{A} went {P:to}, took {T} and came back to share it with {B:him}."), weight=1),
    Event("birthday", "plot",
          "A has T, A owns T, A with B, calm, not two, A first T",
          "B birthday", (
        "It was the birthday of {B:name}.",
        "\"Today is my birthday,\" said {B:name} to {A:him}.",
        "{B} told {A:him} that it was {B:his} birthday.",
        "{A} knew that it was the birthday of {B:name}.",
        "\"Do you know that it is my birthday?\" {B} asked {A:him}."), weight=1.5),
    Event("present", "plot", "B birthday, A has T, A owns T, A with B",
          "no B birthday, no A has T, no A owns T, B has T, B owns T, B owes A", (
        "\"Happy birthday, {B:name}!\" said {A:name} and gave {B:him} {T}.",
        "So {A} gave {B:him} {T} for {B:his} birthday.",
        "{A} had no present, so {A} gave {B:him} {T}.",
        "{A} put {T} into a bag and gave it to {B:him} as a birthday present.",
        "\"{T:The} is my present for you,\" said {A:name} to {B:him}."),
        moods=("B glad: {T} was the best present of all",), weight=4),
    Event("offer_trade", "plot", "B wants T, A has T, A owns T, A with B, B ready U",
          "no B ready U, B bids A T U", (
        "\"I will give you {U:the} for {T:the},\" said {B:name} to {A:him}.",
        "{B} wanted to trade {U:the} for {T:the}.",
        "\"Do you want to trade {T:the} for {U:the}?\" {B} asked {A:him}.",
        "{B} offered {A:him} {U:the} for {T:the}.",
        "\"{A:name}, shall we trade?\" asked {B:name} and held out {U:the}."), weight=4),
    Event("trade", "plot", "B bids A T U, A has T, B has U",
          "no B bids A T U, no B wants T, no A has T, no A owns T, no B has U, "
          "no B owns U, B has T, B owns T, A has U, A owns U, traded", (
        "They traded: {A:name} got {U:the} and {B:name} got {T:the}.",
        "{A} said yes, took {U:the} and gave {B:him} {T:the}.",
        "So {A} gave {B:him} {T:the} and got {U:the}.",
        "\"Yes,\" said {A:name}, and so {B:name} got {T:the} and {A:name} got {U:the}.",
        "{A} agreed, and {B} gave {A:him} {U:the} for {T:the}."),
        moods=("B glad: {T:the} was now {B:his} own",), weight=4),
)

PROMISES = (
    Event("promise", "plot", "A lent B T, B has T, A with B, not B promised A T, not T broken",
          "B promised A T", (
        "{B} promised to bring {T} back soon.",
        "\"I will bring {T:the} back tomorrow,\" {B} promised.",
        "\"I promise to give {T:the} back,\" said {B:name}.",
        "{B} promised {A} to take good care of {T}.",
        "{B} gave {B:his} word that {A} would get {T} back."), weight=5),
    Event("keep_promise", "plot", "B promised A T, B has T, A with B, not T broken",
          "no B promised A T, no A lent B T, no B has T, A has T, true B", (
        "{B} kept {B:his} promise and gave {T} back to {A:him}.",
        "The next day {B} gave {T} back to {A:him}, as {B} had promised.",
        "{B} did not forget {B:his} promise and brought {A:him} {T}.",
        "\"Here is {T:the}, as I promised,\" said {B:name} to {A:him}.",
        "As {B} had promised, {A} soon got {T} back."),
        moods=("A glad: {B} had kept {B:his} promise",), weight=2),
    Event("give_back", "plot", "A lent B T, B has T, A with B, not T broken, not B promised A T",
          "no A lent B T, no B has T, A has T", (
        "In the evening {B} gave {T} back to {A:him}.",
        "Then {B} gave {A:him} {T} back.",
        "Later {A} got {T} back from {B:him}.",
        "After an hour {B} brought {T} back to {A:him}.",
        "\"Here is {T:the},\" said {B:name} and gave it back to {A:him}."),
        moods=("A glad: {A} had {T} back",), weight=2),
)

WRONGS = (
    Event("take", "plot", "B wants T, A has T, A owns T, A with B, not T broken",
          "no B wants T, no A has T, B has T, B took A T", (
        "When {A} was not looking, {B} took {T}.",
        "{B} waited until {A} looked away and took {T}.",
        "So {B} took {T} without asking.",
        "{B} took {T} out of {A:name}'s bag and hid it in {B:his} own.",
        "Then {B} did a bad thing and stole {T}."),
        moods=("A angry: {B} had taken {T}",), weight=2.5),
    Event("accuse", "plot", "B took A T, B has T, A with B", "B accused A T", (
        "\"Give {T:the} back!\" {A} shouted at {B:him}.",
        "\"You are a thief, {B:name}!\" said {A:name}.",
        "{A} saw {T} in {B:his} hands and wanted it back.",
        "\"{B:name}, did you take my {T:noun}?\" asked {A:name}.",
        "\"Why did you take {T:the}?\" {A} asked {B:him}."), weight=3),
    Event("return_taken", "plot", "B accused A T, B took A T, B has T",
          "no B accused A T, no B took A T, no B has T, A has T, B begged A T, B learned take", (
        "\"I am sorry,\" said {B:name} and gave {T} back to {A:him}.",
        "{B} gave {A:him} {T} back and said: \"It was wrong to take it.\"",
        "{B} began to cry and gave {T} back to {A:him}.",
        "\"Here it is, please forgive me,\" said {B:name} to {A:him} and gave back {T}.",
        "{B} looked at the ground and gave {A:him} {T} back."), weight=2),
    Event("forgive", "plot", "B begged A T", "no B begged A T, no B wronged A T", (
        "\"That is all right,\" said {A:name} to {B:him}.",
        "{A} forgave {B:him}, and they were friends again.",
        "\"I forgive you, {B:name},\" said {A:name}.",
        "{A} gave {B:him} {A:his} hand, and all was well again.",
        "\"We are still friends,\" said {A:name} to {B:him} and smiled.")),
    Event("break_lent", "plot", "A lent B T, B has T, A with B, not T broken",
          "T broken, B wronged A T, B learned care", (
        "But {B} fell over a stone, and {T} broke.",
        "But {B} was not careful and broke {T}.",
        "{B} dropped {T}, and it broke in two.",
        "Then {B} sat down on {T} and broke it.",
        "{B} did not take care, and {T} broke in {B:his} hands."),
        moods=("A sad: {B} had broken {T}",
               "B sorry: {B} had broken {T}"), weight=5),
    Event("vow", "plot", "B wronged A T, T broken, A with B, not B vowed A T", "B vowed A T", (
        "\"I will mend {T:the},\" {B} promised.",
        "{B} promised {A} to mend {T}.",
        "\"Tomorrow {T:the} will be as good as before,\" {B} promised.",
        "\"Do not cry, I can mend {T:the},\" said {B:name} to {A:him}.",
        "{B} gave {B:his} word that {B} would mend {T}."), weight=2),
    Event("mend_vowed", "plot", "B vowed A T, T broken, B has T",
          "no B vowed A T, no T broken, no B wronged A T, no A lent B T, "
          "no B promised A T, no B has T, A has T", (
        "{B} kept {B:his} word, mended {T} and gave it back to {A:him}.",
        "All night {B} worked, and in the morning {A} got {T} back, as good as before.",
        "As {B} had promised, {B} mended {T} and brought it to {A:him}.",
        "With glue and string {B} mended {T}, and then {A} had it back.",
        "{B} mended {T} so well that {A} could {T:use} it again."),
        moods=("A glad: {T:the} was as good as before",), weight=3),
)

MISHAPS = (
    Event("break_own", "plot", "A has T, A owns T, calm",
          "T broken", (
        "But {A} fell over a stone, and {T} broke.",
        "But {A} was not careful and broke {T}.",
        "Then {A} dropped {T}, and it broke in two.",
        "But {T} fell out of {A:his} hands and broke.",
        "By mistake {A} sat down on {T} and broke it."),
        moods=("A sad: {T:the} was broken",), weight=0.45),
    Event("mend_own", "plot", "T broken, A has T, A owns T", "no T broken", (
        "{A} took some glue and mended {T}.",
        "{A} worked all evening and mended {T}.",
        "So {A} mended {T} with a piece of string.",
        "With a bit of wood and some glue {A} mended {T}.",
        "In the evening {A} sat down and mended {T}."),
        moods=("A proud: {A} had mended {T}",), weight=0.8),
    Event("help_mend", "plot", "T broken, A has T, A owns T, A with B",
          "no T broken, A owes B, B helped A", (
        "{B} mended {T} for {A:him}.",
        "{B} helped {A:him} to mend {T}.",
        "\"Give it to me,\" said {B:name} to {A:him} and mended {T}.",
        "{B} was good with {B:his} hands and mended {T} for {A:him}.",
        "{B} got some glue, and they mended {T} together."),
        moods=("A glad: {T:the} was whole again",), weight=1.2),
    Event("idea", "plot", "A has T, A owns T, calm, not painted T", "A idea T", (
        "{A} thought that {T} could look better.",
        "But {A} did not like the colour of {T}.",
        "One day {A} wanted to give {T} a new colour.",
        "{A} still had an old pot of paint.",
        "\"This {T:noun} needs some paint,\" said {A:name}."), weight=0.35),
    Event("paint", "plot", "A idea T, A has T", "no A idea T, painted T C", (
        "So {A} painted {T} {C}.",
        "{A} took a brush and painted {T} {C}.",
        "{A} liked {C} best and painted {T} {C}.",
        "With a pot of {C} paint {A} made {T} {C}.",
        "{A} painted {T} {C} from top to bottom."),
        moods=("A glad: {T:the} looked like new",)),
)

LOSSES = (
    Event("forget", "plot", "A has T, A owns T, A at P, calm",
          "no A has T, no A at P, A at home, T lies P, A lost T", (
        "{A} went home, but {A} forgot {T} {P:at}.",
        "In the evening {A} ran home and left {T} {P:at}.",
        "When {A} went home, {A} left {T} {P:at}.",
        "It got late, and {A} ran home and forgot {T} {P:at}.",
        "{A} was called home and left {T} lying {P:at}."), weight=1),
    Event("blow", "plot", "windy, A has T, A owns T, A at W, calm",
          "no A has T, T lies P, A lost T, A missed T", (
        "Suddenly the wind blew {T} {P:to}.",
        "The wind took {T} out of {A:his} hands and carried it {P:to}.",
        "The wind was so strong that {T} flew {P:to}.",
        "Then the wind caught {T} and blew it {P:to}.",
        "{A} did not hold {T} tight, and the wind carried it {P:to}."),
        moods=("A sad: the wind had taken {T} away",), weight=8),
    Event("miss", "plot", "A lost T, not A missed T", "A missed T", (
        "Soon {A} saw that {T} was gone.",
        "{A} opened {A:his} bag, but {T} was not there.",
        "\"Where is my {T:noun}?\" asked {A:name}.",
        "Then {A} noticed that {A} no longer had {T}.",
        "\"{T:The} is gone!\" shouted {A:name}."),
        moods=("A sad scared: {T:the} was gone",), weight=2),
    Event("go_back", "plot", "A missed T, T lies P, A at W", "no A at W, A at P", (
        "So {A} ran {P:to} to look for {T}.",
        "{A} thought for a while and went back {P:to}.",
        "At once {A} ran {P:to}.",
        "\"I must go {P:to} at once,\" said {A:name} and ran off.",
        "{A} hurried {P:to} to get {T}.")),
    Event("find_again", "plot", "A missed T, T lies P, A at P",
          "no A missed T, no A lost T, no T lies P, A has T", (
        "{P:at} {A} found {T} again.",
        "There lay {T:the}, and {A} picked it up.",
        "{A} looked {P:at} until {A} found {T}.",
        "{A} found {T} {P:at} under a bush.",
        "At last {A} saw {T} lying {P:at} and picked it up."),
        moods=("A glad: {A} had found {T} again",), weight=2),
    Event("tell_loss", "plot", "A missed T, A with B, not B knows T, A owns T",
          "B knows T", (
        "\"I have lost {T:the},\" {A} told {B:him}.",
        "\"Have you seen my {T:noun}?\" {A} asked {B:him}.",
        "{A} told {B:him} that {T} was gone.",
        "{A} ran to {B:him} and told {B:him} about {T}.",
        "\"{B:name}, please help me to find {T:the},\" said {A:name}."), weight=1.5),
    Event("search", "plot", "B knows T, A missed T, A owns T, T lies P, B at W",
          "no B at W, B at P, no T lies P, B has T, B found T", (
        "{B} ran {P:to} and found {T} there.",
        "So {B} went {P:to}, looked under every bush and found {T}.",
        "{B} went {P:to}, and there lay {T:the}.",
        "\"I will look {P:at},\" said {B:name}, and there {B} found {T}.",
        "{B} looked for {T} and found it {P:at}."), weight=1.5),
    Event("find_for", "plot", "B at P, T lies P, A lost T, A owns T",
          "no T lies P, B has T, B found T", (
        "{B} found {T} {P:at}.",
        "{B} saw {T} lying {P:at} and picked it up.",
        "After a while {B} found {T} {P:at}, half hidden under some leaves.",
        "{B} walked around {P:at} and found {T}.",
        "{B} nearly stepped on {T}, which lay {P:at}."), weight=1.2),
    Event("bring", "plot", "B found T, B has T, A owns T, A at W, B at V",
          "no B found T, no B has T, no A lost T, no A missed T, no B at V, B at W, "
          "A has T, A owes B, B helped A", (
        "{B} ran to {A:him} and brought {A:him} {T}.",
        "At once {B} brought {T} back to {A:him}.",
        "Soon {A} had {T} back, for {B} brought it.",
        "Then {B} knocked at {A:name}'s door with {T} in {B:his} hand.",
        "\"I have found your {T:noun},\" said {B:name}, when {B} came to {A:him}."),
        moods=("A glad: {A} had {T} back",), weight=3),
)

ANIMALS_COME = (
    Event("snatch", "plot", "A has T, A owns T, A at W, calm, not beast",
          "beast, no A has T, X has T, X at P, X snatched T", (
        "Suddenly {X:a} came, took {T} and ran {P:to}.",
        "Then {X:a} grabbed {T} and ran {P:to} with it.",
        "But {X:a} pulled {T} out of {A:his} hands and ran {P:to}.",
        "{A} put {T} down, and at once {X:a} ran {P:to} with it.",
        "Out of nowhere came {X:a} and carried {T} {P:to}."),
        moods=("A angry: {X} had taken {T}",
               "A scared: {X} was so big and wild"), weight=1.2),
    Event("chase", "plot", "X snatched T, A owns T, X at P, A at W",
          "no A at W, A at P", (
        "{A} ran after {X} {P:to}.",
        "{A} followed {X} {P:to}.",
        "\"Stop!\" shouted {A:name} and ran after {X} {P:to}.",
        "As fast as {A} could, {A} ran {P:to} after {X}.",
        "{A} was not afraid of {X} and hurried {P:to}."), weight=1.5),
    Event("regain", "plot", "X snatched T, A owns T, X at P, A at P, X has T",
          "no X snatched T, no X has T, A has T", (
        "{A} caught {X} {P:at} and took {T} back.",
        "{X} let {T} fall, and {A} picked it up.",
        "{P:at} {A} pulled {T} out of its mouth.",
        "{X} got tired, and {A} got {T} back.",
        "{A} clapped {A:his} hands, and {X} ran away and left {T} {P:at}, where {A} picked it up."),
        moods=("A glad: {A} had {T} back",), weight=1.5),
    Event("stuck", "plot", "A has T, A owns T, A at P, calm, not beast",
          "beast, X stuck, X at P", (
        "{P:at} {A} saw {X:a} that had fallen into a hole.",
        "{A} heard {X:a} crying {P:at}, for it was caught in a fence.",
        "There was {X:a} {P:at}, and its foot was caught in a rope.",
        "{A} found {X:a} in an old net {P:at}.",
        "In a hole {P:at} sat {X:a} and could not get out."),
        moods=("A sad: {X} could not get free",), weight=1),
    Event("rescue", "plot", "X stuck, X at P, A at P, A owns T", "no X stuck, X friend A", (
        "{A} took {X} in {A:his} arms and set it free.",
        "{A} helped {X} to get free.",
        "\"Do not be afraid,\" said {A:name} to {X} and set it free.",
        "{A} was very careful and got {X} out.",
        "It was not easy, but {A} saved {X}."),
        moods=("A proud: {A} had saved {X}",), weight=3),
    Event("repay", "plot", "X friend A, A missed T, T lies P, A at W, A owns T",
          "no A missed T, no A lost T, no T lies P, A has T, X at W", (
        "{X} ran {P:to} and came back with {T} in its mouth.",
        "Then {X} came and brought {A:him} {T} from {P:the}.",
        "{X} had found {T} {P:at} and carried it to {A:him}.",
        "But {X} had seen {T} {P:at} and brought it to {A:him}.",
        "{X} wanted to thank {A:him} and got {T}, which lay {P:at}."),
        moods=("A glad: {A} had {T} back",), weight=12),
)

SIDE = (
    Event("thank", "side", "B owes A", "no B owes A", (
        "{B} thanked {A:him}.",
        "\"Thank you, {A:name}!\" said {B:name}.",
        "\"You are a real friend, {A:name},\" said {B:name}.",
        "\"How can I thank you?\" {B} asked {A:him}.",
        "{B} hugged {A:him} and thanked {A:him} again and again.")),
)

ENDINGS = (
    Event("end_still", "end", "A has T, A owns T, A first T, calm", "end", (
        "And {A} still has {T}.",
        "In the end {A} still had {T:the}.",
        "So {T} stayed with {A:him}.",
        "That night {A} slept with {T} beside {A:his} bed.",
        "From then on {A} took good care of {T}.",
        "{A} never let {T} out of {A:his} sight again."), weight=1),
    Event("end_owner", "end", "A has T, A owns T, not A first T, calm", "end", (
        "In the end {A} had {T}.",
        "From that day on {T} belonged to {A:him}.",
        "So {T} was {A:name}'s now.",
        "That night {T} lay beside {A:name}'s bed.",
        "And so {A} became the owner of {T}.",
        "To this day {A} keeps {T} in {A:his} room.")),
    Event("end_traded", "end", "traded, A owns U, B owns T, A first T, B first U, calm", "end", (
        "In the end {A:name} had {U:the} and {B:name} had {T:the}.",
        "From that day on {U:the} belonged to {A:name} and {T:the} to {B:name}.",
        "So {B:name} went home with {T:the} and {A:name} with {U:the}.",
        "And neither {A:name} with {U:the} nor {B:name} with {T:the} wanted to trade back.",
        "That night {T:the} lay beside {B:name}'s bed and {U:the} beside {A:name}'s."), weight=8),
    Event("end_together", "end", "A shared B T, A has T, A owns T, A at W, B at W, calm", "end", (
        "{AB} played with {T} until it was dark.",
        "From that day on {AB} shared everything, and most of all {T:the}.",
        "And so {AB} had more fun with {T} than ever before.",
        "Since that day {T} has belonged to both of them.",
        "In the evening {A} took {T} home, and {B} went with {A:him}."), weight=3),
    Event("end_learned", "end", "B learned take, A has T, A owns T, calm", "end", (
        "{A} kept {T}, and {B} never again took what was not {B:his} own.",
        "Since then {B} always asks before {B} takes {T}.",
        "{B} had learned not to steal, and {T} was safe with {A:him}.",
        "From then on {B} always asked {A:name} first, when {B} wanted {T}.",
        "So {A} had {T} back, and {B} had learned to ask first."), weight=3),
    Event("end_careful", "end", "B learned care, A has T, A owns T, calm", "end", (
        "From then on {B} was more careful with {T}.",
        "{A} had {T} back, and {B} had learned to be careful.",
        "And {B} never broke {T} again.",
        "{B} had learned to be careful, and {A} kept {T}.",
        "Since then {B} always holds {T} with both hands."), weight=3),
    Event("end_true", "end", "true B, A has T, A owns T, calm", "end", (
        "Since then {A} always lent {T} to {B:him}.",
        "And {A} knew that {B} could be trusted with {T}.",
        "So {A} had {T} again, and {B} could have it whenever {B} liked.",
        "\"You may have {T:the} again,\" said {A:name} to {B:him} in the end.",
        "In the end {A} had {T} and a friend who kept {B:his} word."), weight=3),
    Event("end_helped", "end", "B helped A, A has T, A owns T, calm", "end", (
        "In the end {A} had {T}, and {B} was {A:his} best friend.",
        "{A} never forgot that {B} had helped {A:him} with {T}.",
        "From that day on {A} let {B:him} {T:use} {T} whenever {B} wanted.",
        "So {A} could {T:use} {T} again, all thanks to {B:him}.",
        "That night {A} put {T} beside the bed and thought of {B:him}."), weight=2),
    Event("end_pet", "end", "X friend A, A has T, A owns T, calm", "end", (
        "From that day on {X} followed {A:him} everywhere, and {A} had {T} and a friend.",
        "In the evening {A} went home with {T}, and {X} came, too.",
        "That night {X} slept in {A:name}'s house, right beside {T}.",
        "{X} stayed with {A:him} and slept beside {T} every night.",
        "Now {A} had {T} and {X:a} as well."), weight=4),
    Event("end_refused", "end", "A refused B T, A has T, calm but refused", "end", (
        "So {A} kept {T}, but {B} never asked {A:him} again.",
        "{B} went home without {T}, and {A} was alone with it.",
        "In the end {A} still had {T}, but {B} did not come back to play.",
        "{A} had {T} to play with, but nobody to play with, for {B} had gone home.",
        "And {B} never got {T} from {A:him}."), weight=0.15),
)

BASIC = (OPENINGS + INTRODUCTIONS + QUIET + WISHES + PROMISES + WRONGS + MISHAPS + LOSSES
         + ANIMALS_COME + SIDE + ENDINGS)


def feelings(event):
    """The side events that tell how somebody felt after an event: a row for each of its moods."""
    for line in event.moods:
        who, why = line.split(": ")
        role, *moods = who.split()
        fact = feeling_fact(event, line)
        for mood in moods:
            yield Event(f"{event.name}_{role}_{mood}", "side", fact, f"no {fact}",
                        mood_ways(role, mood, why))


def feeling_fact(event, line):
    """The fact that somebody feels something after an event, with all whom the reason names:
    "B feels lend_B T"."""
    who, why = line.split(": ")
    role = who.split()[0]
    others = sorted(set(re.findall(r"{([A-Z])", why)) - {role})
    return " ".join([role, "feels", f"{event.name}_{role}", *others])


def mood_ways(role, mood, why):
    """The sentences that tell the mood of a role, with and without the clause that says why."""
    word, act = MOODS[mood]
    ways = [fill(frame, mood=word, act=act, why=why) for frame in MOOD_FRAMES]
    return tuple(way.replace("{W", f"{{{role}") for way in ways)


def fill(frame, **parts):
    """A frame with some of its slots filled; the others stay."""
    for name, part in parts.items():
        frame = frame.replace(f"{{{name}}}", part)
    return frame


EVENTS = BASIC + tuple(mood for event in BASIC for mood in feelings(event))
