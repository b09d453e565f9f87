"""What can happen in a tale, and how one says it: the table that generator and checker share.

An event has roles, capital letters: A B D are persons, T U things, X an animal, P Q places with a
name, V W any places (home too), C a colour. `needs` says what must hold before, `then` what holds
afterwards, in facts such as "A has T":

    A has T, not T broken       facts that hold, and facts that do not; * stands for anything
    A with B                    both are at one place
    whole T                     neither broken nor dirty
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

from data.tales_world import (
    FRAMES_ALONE,
    FRAMES_OF_BOTH,
    FRAMES_WITH_ACT,
    FRAMES_WITH_WHY,
    MOODS,
)


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
FRESH = {"feels", "owes", "sad"}
# What must be answered at once, before anything else happens.
URGENT = {"asked", "offered", "bids", "begged", "accused", "invited", "asleep", "race", "idea",
          "ready"}
# What an ordinary ending must not leave open.
OPEN = {"bare", "wants", "refused", "lost", "broken", "dirty", "took", "wronged", "cross", "lent",
        "promised", "vowed", "coming", "birthday", "stuck", "hid", "snatched", "found", "begged",
        "alone", "told", "hosts"} | URGENT

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
    Event("indoors", "intro", "nobody, not start", "no nobody, A person, A bare, A at home", (
        "A {A:kid} called {A:name} looked out of the window.",
        "A {A:kid} called {A:name} had just woken up.",
        "Little {A:name} sat at the window and was bored.",
        "In a small house lived a {A:kid} called {A:name}.",
        "A {A:kid} called {A:name} did not know what to do.")),
    Event("outing", "intro", "nobody",
          "no start, no nobody, A person, A at P, A has T, A owns T, A first T", (
        "{A:name} was {P:at} with {A:his} {T:full}.",
        "A {A:kid} called {A:name} was sitting {P:at} with {T:a}.",
        "{A:name} had taken {A:his} {T:full} {P:to}.",
        "A little {A:kid} called {A:name} was playing {P:at} with {T:a}.",
        "{A:name} was walking {P:to} with {T:a} under {A:his} arm."), weight=3),
    Event("owner", "intro", "A bare", "no A bare, A has T, A owns T, A first T", (
        "{A} had {T:a}.",
        "{A} loved {A:his} {T:full} more than anything.",
        "{A:his} grandmother had given {A:him} {T:a}.",
        "{A} owned only one thing, {T:a}.",
        "{A} had got {T:a} from {A:his} uncle."), weight=2),
    Event("make", "intro", "A bare", "no A bare, A has T, A owns T, A first T", (
        "One day {A} made {T:a}.",
        "{A} made {T:a} with {A:his} own hands.",
        "{A} worked all morning and made {T:a}.",
        "{A} found some paper, string and glue and made {T:a}.",
        "{A:his} father showed {A:him} how to make {T:a}."),
        moods=("A proud glad: {A} had made {T} all alone | {T:the} looked so good",), weight=0.5),
    Event("buy", "intro", "A bare, A at home",
          "no A bare, A has T, A owns T, A first T", (
        "{A} had saved {A:his} money and bought {T:a}.",
        "One day {A} went to a shop and bought {T:a}.",
        "{A} bought {T:a} with {A:his} last money.",
        "{A} bought {T:a} from an old man.",
        "For three coins {A} bought {T:a}."),
        moods=("A glad: {T:the} was now {A:his} own | {A} had always wanted {T:a}",), weight=0.5),
    Event("friend", "intro", "A person, A at home, A owns T, not pair, not happened",
          "pair, B person, B at home", (
        "{B:name} was {A:his} best friend.",
        "{A:his} best friend was called {B:name}.",
        "{A} had a good friend called {B:name}.",
        "{A:his} friend {B:name} lived next door.",
        "In the house next door lived {A:his} friend {B:name}.")),
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
    Event("passer", "intro", "pair, A person, A at P, A owns T, not crowd, not start",
          "crowd, D person, D at P", (
        "Just then {D:name} came {P:to}.",
        "Their friend {D:name} was {P:at}, too.",
        "A {D:kid} called {D:name} came along.",
        "Then a {D:kid} called {D:name} walked by.",
        "After a while {D:name} came {P:to} as well."), weight=1.5),
    Event("second", "intro", "B wants T, A has T, A owns T, A with B, not two",
          "two, B has U, B owns U, B first U, B ready U", (
        "{B} had {U:a}.",
        "{B} had brought {U:a}.",
        "{B:name} was carrying {U:a}.",
        "{B} had {U:a} in {B:his} bag.",
        "{B:name} held {U:a} in {B:his} hands."), weight=1.5),
)

QUIET = (
    Event("go", "quiet", "A at home, A has T, A owns T, not happened, not went",
          "went, no A at home, A at P", (
        "One day {A} took {T} {P:to}.",
        "{A} went {P:to} to {T:use} {T}.",
        "One morning {A} carried {T} {P:to}.",
        "{A} put {T} into a bag and walked {P:to}.",
        "{A} wanted to {T:use} {T}, so {A} went {P:to}."), weight=2),
    Event("go_both", "quiet", "A at W, B at W, A has T, not happened, not went together",
          "went together, no A at W, no B at W, A at P, B at P", (
        "One day {AB} went {P:to}.",
        "{AB} took {T} {P:to}.",
        "{AB} wanted to {T:use} {T}, so they went {P:to}.",
        "\"Let us go {P:to},\" said {A:name} to {B:him}, and they went.",
        "{AB} ran {P:to} with {T}.")),
    Event("come", "quiet", "A at P, B person, B at W, not B at P, A owns T, not beast",
          "no B at W, B at P", (
        "{B} came {P:to}, too.",
        "After a while {B} came {P:to} to look for {A:him}.",
        "{B} followed {A:him} {P:to}.",
        "Soon {B:name} was {P:at} as well.",
        "Then {A} saw {B:him} {P:at}.")),
)

WISHES = (
    Event("admire", "plot", "A has T, A owns T, A with B, calm, not B tried T, not B first T",
          "B wants T", (
        "{B} liked {T} at once.",
        "{B} thought that {T} was wonderful.",
        "{B} could not stop looking at {T}.",
        "\"What a fine {T:noun}!\" said {B:name}.",
        "{B} wanted to {T:use} {T}, too."), weight=13),
    Event("ask", "plot", "B wants T, A has T, A owns T, A with B, whole T", "B asked A T", (
        "\"May I have {T:the} for a while?\" asked {B:name}.",
        "\"{A:name}, may I {T:use} {T:the}?\" asked {B:name}.",
        "{B} asked {A:him} for {T}.",
        "{B} asked {A:him} to lend {B:him} {T}.",
        "\"Please lend me {T:the},\" said {B:name} to {A:him}."), weight=14),
    Event("lend", "plot", "B asked A T",
          "no B asked A T, no B wants T, no A has T, B has T, A lent B T, B tried T, B owes A", (
        "\"Yes, of course,\" said {A:name} and gave {B:him} {T}.",
        "{A} was kind and lent {B:him} {T}.",
        "\"You may {T:use} it until tomorrow,\" said {A:name} to {B:him}.",
        "So {A} lent {T} to {B:him} for a while.",
        "\"Yes, but I want it back,\" said {A:name} and gave {T} to {B:him}."),
        moods=("B glad: {A} had lent {B:him} {T} | now {B} could {T:use} {T}",), weight=2.5),
    Event("lend_promised", "plot", "B asked A T",
          "no B asked A T, no B wants T, no A has T, B has T, A lent B T, B promised A T, "
          "B tried T, B owes A", (
        "{B} promised to bring {T} back, and so {A} lent it to {B:him}.",
        "\"Yes, if you promise to bring it back,\" said {A:name} and gave {B:him} {T}.",
        "{A} lent {B:him} {T}, and {B} promised to give it back soon.",
        "{B} gave {B:his} word to bring {T} back, and {A} lent it to {B:him}.",
        "{A} gave {B:him} {T}, and {B} promised to take good care of it."),
        moods=("B glad: {A} had lent {B:him} {T} | now {B} could {T:use} {T}",), weight=3),
    Event("refuse", "plot", "B asked A T", "no B asked A T, no B wants T, A refused B T", (
        "\"No, {T:the} is mine,\" said {A:name}.",
        "But {A} did not want to lend {B:him} {T}.",
        "\"No, you will break it,\" said {A:name} to {B:him}.",
        "{A} said no and held {T} tight.",
        "But {A} would not give {B:him} {T}."),
        moods=("B sad angry: {A} had said no | {A} would not lend {B:him} {T}",), weight=3),
    Event("relent", "plot", "A refused B T, A has T, A with B",
          "no A refused B T, no A has T, B has T, A lent B T, B tried T, B owes A", (
        "Then {A} felt sorry for {B:him} and lent {B:him} {T}.",
        "In the end {A} lent {B:him} {T} after all.",
        "\"All right, take it for a while,\" said {A:name} at last and gave {B:him} {T}.",
        "After a while {A} changed {A:his} mind and lent {T} to {B:him}.",
        "\"I am sorry, here is {T:the},\" said {A:name} and gave it to {B:him}."),
        moods=("B glad: {A} had lent {B:him} {T} after all | {A} had changed {A:his} mind",),
        weight=4),
    Event("share", "plot", "B wants T, A has T, A owns T, A with B, whole T, not B tried T",
          "no B wants T, A shared B T, B tried T", (
        "\"Let us {T:use} it together,\" said {A:name}, and {B} ran to get {T}.",
        "So {A} shared {T} with {B:him}.",
        "{A} let {B:him} {T:use} {T}, and then it was {A:his} turn again.",
        "\"First I will {T:use} it and then you,\" said {A:name} and shared {T} with {B:him}.",
        "{AB} took turns with {T}, because {A} liked to share."),
        moods=("B glad: {A} had shared {T} with {B:him}",), weight=1),
    Event("share_after_all", "plot", "A refused B T, A has T, A with B",
          "no A refused B T, A shared B T, B tried T", (
        "Then {A} felt sorry, and they shared {T}.",
        "\"We can share it,\" said {A:name} at last, and so they took turns with {T}.",
        "But it was dull to {T:use} {T} alone, and so {A} shared it with {B:him}.",
        "After a while {A} said: \"Come, {B:name}, we will {T:use} {T:the} together.\"",
        "At last {A} let {B:him} {T:use} {T} as well."), weight=2),
    Event("give", "plot", "B wants T, A has T, A owns T, A with B, whole T",
          "no B wants T, no A has T, no A owns T, B has T, B owns T, B owes A", (
        "So {A} gave {B:him} {T}.",
        "{A} had to smile and gave {T} to {B:him}.",
        "\"You may keep it,\" said {A:name} and gave {B:him} {T}.",
        "\"Take {T:the}, it is yours,\" said {A:name} to {B:him}.",
        "{A} was a good friend and gave {B:him} {T} as a present."),
        moods=("B glad: {A} had given {B:him} {T} | {T} was now {B:his} own",
               "A glad proud: {A} had made {B:him} happy"), weight=1),
    Event("birthday", "plot",
          "A has T, A owns T, A with B, calm, not two, A first T",
          "B birthday", (
        "It was the birthday of {B:name}.",
        "\"Today is my birthday,\" said {B:name} to {A:him}.",
        "{B} told {A:him} that it was {B:his} birthday.",
        "{A} knew that it was the birthday of {B:name}.",
        "\"Do you know that it is my birthday?\" {B} asked {A:him}."), weight=1),
    Event("present", "plot", "B birthday, A has T, A owns T, A with B",
          "no B birthday, no A has T, no A owns T, B has T, B owns T, B owes A", (
        "\"Happy birthday, {B:name}!\" said {A:name} and gave {B:him} {T}.",
        "So {A} gave {B:him} {T} for {B:his} birthday.",
        "{A} had no present, so {A} gave {B:him} {T}.",
        "{A} put {T} into a bag and gave it to {B:him} as a birthday present.",
        "\"{T:The} is my present for you,\" said {A:name} to {B:him}."),
        moods=("B glad: {A} had given {B:him} {T} | {T} was the best present of all",
               "A glad: {A} had made {B:him} happy"), weight=4),
    Event("offer_money", "plot", "B wants T, A has T, A owns T, A with B, whole T",
          "B offered A T", (
        "\"I will give you five coins for {T:the},\" said {B:name} to {A:him}.",
        "{B} wanted to buy {T} from {A:him}.",
        "{B} took out three coins and asked {A:him} to sell {T}.",
        "\"Will you sell {T:the} to me, {A:name}?\" asked {B:name}.",
        "\"How much is {T:the}?\" {B} asked {A:him}."), weight=1),
    Event("sell", "plot", "B offered A T",
          "no B offered A T, no B wants T, no A has T, no A owns T, B has T, B owns T", (
        "{A} took the money and gave {B:him} {T}.",
        "So {A} sold {T} to {B:him}.",
        "{A} needed the money and sold {B:him} {T}.",
        "\"All right,\" said {A:name}, and {B} bought {T}.",
        "{B} paid, and {A} gave {B:him} {T}."),
        moods=("B glad: {A} had sold {B:him} {T} | {B:he} had bought {T}",)),
    Event("not_sell", "plot", "B offered A T",
          "no B offered A T, no B wants T, A refused B T", (
        "\"No, I will never sell it,\" said {A:name} to {B:him}.",
        "But {A} did not want to sell {T}.",
        "{A} said that {T} was not for sale.",
        "But {A} would not sell {T} to {B:him} for all the money in the world.",
        "But {A} liked {T} more than money and kept it."),
        moods=("B sad angry: {A} had said no | {A} would not sell {B:him} {T}",)),
    Event("race", "plot", "B wants T, A has T, A owns T, A with B, whole T", "A race B T", (
        "\"Let us run a race,\" said {A:name} to {B:him}, \"and the winner gets {T:the}.\"",
        "{AB} ran a race, and {T} was the prize.",
        "\"If you can run faster than me, you get {T:the},\" said {A:name} to {B:him}.",
        "{A} put {T} on the grass, and they ran a race for it.",
        "{AB} wanted to run a race, and the winner would get {T}."), weight=1),
    Event("win", "plot", "A race B T",
          "no A race B T, no B wants T, no A has T, no A owns T, B has T, B owns T", (
        "{B} was faster and won {T}.",
        "{B} won the race, and {A} gave {B:him} {T}.",
        "{B} ran like the wind and won {T}.",
        "{A} fell over a stone, and so {B} won {T}.",
        "{A} was too slow, and so {T} went to {B:him}."),
        moods=("B proud glad: {B} had won {T} | {B} had been faster than {A:him}",
               "A sad: {A} had lost {T} in the race")),
    Event("win_own", "plot", "A race B T", "no A race B T, no B wants T, B tried T", (
        "{A} was faster and kept {T}.",
        "{A} won the race and kept {T}.",
        "{B} was too slow, and so {A} kept {T}.",
        "{B} fell over a stone, and {A} kept {T}.",
        "{A} ran like the wind, and so {T} stayed with {A:him}."),
        moods=("A proud glad: {A} had won the race | {A} had been faster than {B:him}",
               "B sad: {B} had not won {T}")),
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
        moods=("B glad: {B} had got {T:the} | {T:the} was now {B:his} own",
               "A glad: {A} had got {U:the} | {U:the} was now {A:his} own"), weight=4),
    Event("no_trade", "plot", "B bids A T U",
          "no B bids A T U, no B wants T, A refused B T", (
        "\"No, I like {T:the} more,\" said {A:name}.",
        "But {A} did not want {U:the} and kept {T:the}.",
        "{A} looked at {U:the} and said no.",
        "But {A} would not trade {T:the} for {U:the}.",
        "\"No, keep {U:the},\" said {A:name} to {B:him}."),
        moods=("B sad: {A} had said no | {A} did not want {U:the}",), weight=1.2),
)

PROMISES = (
    Event("promise", "plot", "A lent B T, B has T, A with B, not B promised A T, whole T",
          "B promised A T", (
        "{B} promised to bring {T} back soon.",
        "\"I will bring {T:the} back tomorrow,\" {B} promised.",
        "\"I promise to give {T:the} back,\" said {B:name}.",
        "{B} promised {A} to take good care of {T}.",
        "{B} gave {B:his} word that {A} would get {T} back."), weight=3.5),
    Event("use", "quiet", "A lent B T, B has T, whole T, not B used T", "B used T", (
        "{B} was allowed to {T:use} {T} all day.",
        "{B} began to {T:use} {T} at once.",
        "All day long {B} did nothing but {T:use} {T}.",
        "{B} learned how to {T:use} {T}.",
        "{B} had never been allowed to {T:use} {T:a} before."), weight=1),
    Event("keep_promise", "plot", "B promised A T, B has T, A with B, whole T, not B forgot T",
          "no B promised A T, no A lent B T, no B has T, A has T, true B", (
        "{B} kept {B:his} promise and gave {T} back to {A:him}.",
        "The next day {B} gave {T} back to {A:him}, as {B} had promised.",
        "{B} did not forget {B:his} promise and brought {A:him} {T}.",
        "\"Here is {T:the}, as I promised,\" said {B:name} to {A:him}.",
        "As {B} had promised, {A} soon got {T} back."),
        moods=("A glad: {B} had kept {B:his} promise | {B} had brought {T} back",
               "B proud: {B} had kept {B:his} promise"), weight=1.5),
    Event("forget_promise", "plot", "B promised A T, B has T, not B forgot T, whole T",
          "B forgot T", (
        "But {B} forgot {B:his} promise and kept {T}.",
        "But the days went by, and {B} did not bring {T} back.",
        "{A} waited and waited, but {B} had forgotten {B:his} promise.",
        "But {B} forgot that {T} was not {B:his} own.",
        "A week later {B} still had {T} and did not think of {B:his} promise."),
        moods=("A sad angry: {B} had forgotten {B:his} promise | {B} had not brought {T} back",),
        weight=4),
    Event("remind", "plot", "B forgot T, B promised A T, A with B", "no B forgot T, B minds T", (
        "\"Where is my {T:noun}?\" {A} asked {B:him}.",
        "\"{B:name}, you still have my {T:noun},\" said {A:name}.",
        "{A} told {B:him} that {A} wanted {T} back.",
        "\"Have you forgotten your promise, {B:name}?\" asked {A:name}.",
        "So {A} went to {B:him} and asked for {T}."), weight=3),
    Event("remember", "plot", "B forgot T, B promised A T", "no B forgot T, B minds T", (
        "Then {B} remembered what {B} had promised.",
        "One night {B} lay in bed and remembered {B:his} promise.",
        "At last {B} remembered that {T} was not {B:his} own.",
        "Suddenly {B} remembered {B:his} promise to {A:him}.",
        "When {B} saw {T} again, {B} thought of {B:his} promise."),
        moods=("B sorry: {B} had forgotten {B:his} promise",), weight=3),
    Event("return_late", "plot", "B minds T, B promised A T, B has T, A with B",
          "no B minds T, no B promised A T, no A lent B T, no B has T, A has T", (
        "\"I am sorry that you had to wait,\" said {B:name} and gave {T} back to {A:him}.",
        "{B} said sorry and gave {A:him} {T} back.",
        "So {B} ran to {A:him} and brought {A:him} {T} at last.",
        "\"Here is {T:the}, I had forgotten it,\" said {B:name} to {A:him}.",
        "At once {B} got {T} and gave it back to {A:him}."),
        moods=("A glad: {A} had {T} back | {B} had brought {T} back at last",), weight=4),
    Event("give_back", "plot", "A lent B T, B has T, A with B, whole T, not B promised A T",
          "no A lent B T, no B has T, A has T", (
        "In the evening {B} gave {T} back to {A:him}.",
        "Then {B} gave {A:him} {T} back.",
        "Later {A} got {T} back from {B:him}.",
        "After an hour {B} brought {T} back to {A:him}.",
        "\"Here is {T:the},\" said {B:name} and gave it back to {A:him}."),
        moods=("A glad: {B} had given {T} back | {A} had {T} back",), weight=0.7),
)

WRONGS = (
    Event("take", "plot", "A refused B T, A has T, A with B",
          "no A refused B T, no A has T, B has T, B took A T", (
        "When {A} was not looking, {B} took {T}.",
        "{B} waited until {A} looked away and took {T}.",
        "So {B} took {T} without asking again.",
        "{B} took {T} out of {A:name}'s bag and hid it in {B:his} own.",
        "Then {B} did a bad thing and stole {T}."),
        moods=("A angry sad: {B} had taken {T} | {B} had stolen {T}",), weight=6),
    Event("accuse", "plot", "B took A T, B has T, A with B, not B denied T", "B accused A T", (
        "\"Give {T:the} back!\" {A} shouted at {B:him}.",
        "\"You are a thief, {B:name}!\" said {A:name}.",
        "{A} saw {T} in {B:his} hands and wanted it back.",
        "\"{B:name}, did you take my {T:noun}?\" asked {A:name}.",
        "\"Why did you take {T:the}?\" {A} asked {B:him}."), weight=3),
    Event("deny", "plot", "B accused A T, B took A T, B has T",
          "no B accused A T, B denied T", (
        "\"I do not have it,\" said {B:name}, but that was a lie.",
        "But {B} ran away with {T}.",
        "\"It is mine now,\" said {B:name} and went home with {T}.",
        "But {B} told a lie and kept {T}.",
        "{B} laughed and did not give {T} back."),
        moods=("A sad angry: {B} had not given {T} back",), weight=1.5),
    Event("return_taken", "plot", "B accused A T, B took A T, B has T",
          "no B accused A T, no B took A T, no B has T, A has T, B begged A T, B learned take", (
        "\"I am sorry,\" said {B:name} and gave {T} back to {A:him}.",
        "{B} gave {A:him} {T} back and said: \"It was wrong to take it.\"",
        "{B} began to cry and gave {T} back to {A:him}.",
        "\"Here it is, please forgive me,\" said {B:name} to {A:him} and gave back {T}.",
        "{B} looked at the ground and gave {A:him} {T} back."), weight=2),
    Event("take_back", "plot", "B accused A T, B took A T, B has T",
          "no B accused A T, no B took A T, no B has T, A has T, A cross B T", (
        "But {B} said nothing, and so {A} took {T} out of {B:his} hands.",
        "{AB} quarreled until {A} got {T} back.",
        "\"It is mine now!\" said {B:name}, but {A} took {T} back.",
        "{B} tried to run away, but {A} was faster and took {T} back.",
        "{AB} pulled at {T} until {A} had it again.")),
    Event("forgive", "plot", "B begged A T", "no B begged A T, no B wronged A T, A friends B", (
        "\"That is all right,\" said {A:name} to {B:him}.",
        "{A} forgave {B:him}, and they were friends again.",
        "\"I forgive you, {B:name},\" said {A:name}.",
        "{A} gave {B:him} {A:his} hand, and all was well again.",
        "\"We are still friends,\" said {A:name} to {B:him} and smiled.")),
    Event("not_forgive", "plot", "B begged A T, not B wronged A T",
          "no B begged A T, A cross B T", (
        "But {A} did not want to speak to {B:him}.",
        "But {A} was still angry and turned away from {B:him}.",
        "\"Go away, {B:name}!\" said {A:name}.",
        "\"You are not my friend any more,\" said {A:name} to {B:him}.",
        "But {A} did not forgive {B:him}."), weight=0.4),
    Event("bad_conscience", "plot", "B took A T, B has T, A with B, not A asleep",
          "no B took A T, no * denied T, no * accused * *, no B has T, A has T, B begged A T, "
          "B learned take", (
        "But {B} could not sleep that night and brought {T} back to {A:him}.",
        "But {B} had no fun with {T} and gave it back to {A:him}.",
        "{B} knew that it was wrong and gave {T} back to {A:him}.",
        "The next day {B} brought {A:him} {T} and said: \"I was wrong to take it.\"",
        "At last {B} gave {A:him} {T} back and told {A:him} everything."),
        moods=("A glad: {A} had {T} back",
               "B sorry: {B} had taken {T}"), weight=1),
    Event("make_up", "plot", "A cross B T, A with B", "no A cross B T, A friends B", (
        "The next day {AB} made up and were friends again.",
        "Soon {AB} forgot their quarrel.",
        "\"Let us be friends again,\" said {B:name} to {A:him}, and {A} smiled.",
        "\"I do not want to quarrel,\" said {A:name} to {B:him}, and they shook hands.",
        "After an hour {AB} had to laugh and made up.")),
    Event("break_lent", "plot", "A lent B T, B has T, A with B, whole T, not B forgot T",
          "T broken, B wronged A T, B learned care", (
        "But {B} fell over a stone, and {T} broke.",
        "But {B} was not careful and broke {T}.",
        "{B} dropped {T}, and it broke in two.",
        "Then {B} sat down on {T} and broke it.",
        "{B} wanted to {T:use} {T}, but it broke in {B:his} hands."),
        moods=("A sad angry: {B} had broken {T}",
               "B sorry: {B} had broken {T}"), weight=3),
    Event("quarrel", "plot", "B wronged A T, A with B, not A cross B T", "A cross B T", (
        "{AB} quarreled about {T}.",
        "\"You have broken my {T:noun}!\" {A} shouted at {B:him}.",
        "{A} said that {B} was a fool, and they quarreled.",
        "\"It was your fault!\" said {A:name} to {B:him}.",
        "{AB} did not speak to each other, because {T} was broken."), weight=1.5),
    Event("vow", "plot", "B wronged A T, T broken, A with B, not B vowed A T", "B vowed A T", (
        "\"I will mend {T:the},\" {B} promised.",
        "{B} promised {A} to mend {T}.",
        "\"Tomorrow {T:the} will be as good as before,\" {B} promised.",
        "\"Do not cry, I can mend {T:the},\" said {B:name} to {A:him}.",
        "{B} gave {B:his} word that {B} would mend {T}."), weight=2),
    Event("mend_vowed", "plot", "B vowed A T, T broken, B has T",
          "no B vowed A T, no T broken, no B wronged A T, no A cross B T, no A lent B T, "
          "no B promised A T, no B has T, A has T", (
        "{B} kept {B:his} word, mended {T} and gave it back to {A:him}.",
        "All night {B} worked, and in the morning {A} got {T} back, as good as before.",
        "As {B} had promised, {B} mended {T} and brought it to {A:him}.",
        "With glue and string {B} mended {T}, and then {A} had it back.",
        "{B} mended {T} so well that {A} could {T:use} it again."),
        moods=("A glad: {B} had mended {T} | {T:the} was as good as before",
               "B proud: {B} had mended {T}"), weight=3),
    Event("mend_wronged", "plot", "B wronged A T, T broken, B has T, not B vowed A T",
          "no T broken, no B wronged A T, no A cross B T, no A lent B T, no B promised A T, "
          "no B has T, A has T, no B begged A T", (
        "{B} found some glue, mended {T} and gave it back to {A:him}.",
        "So {B} mended {T} and gave it to {A:him}.",
        "{B} worked until {T} was whole again and brought it back to {A:him}.",
        "It took {B:him} a long time to mend {T}, but then {A} got it back.",
        "\"Look, {T:the} is whole again,\" said {B:name} and gave it to {A:him}."),
        moods=("A glad: {B} had mended {T} | {T:the} was whole again",
               "B proud: {B} had mended {T}")),
)

MISHAPS = (
    Event("break_own", "plot", "A has T, A owns T, calm",
          "T broken", (
        "But {A} fell over a stone, and {T} broke.",
        "But {A} was not careful and broke {T}.",
        "Then {A} dropped {T}, and it broke in two.",
        "One morning {T} fell out of {A:his} hands and broke.",
        "{A} wanted to {T:use} {T}, but it broke."),
        moods=("A sad: {T:the} was broken | {A} had broken {T}",), weight=0.5),
    Event("advise", "plot", "T broken, A has T, A owns T, A with B, not T hope, not T spoiled",
          "T hope, A owes B", (
        "\"You can mend {T:the} with some glue,\" said {B:name} to {A:him}.",
        "{B} showed {A:him} how to mend {T}.",
        "{B} taught {A:him} how one mends {T:a}.",
        "{B} knew what to do and gave {A:him} some glue for {T}.",
        "\"Do not cry, {A:name}, {T:the} can be mended,\" said {B:name}.")),
    Event("mend_own", "plot", "T broken, A has T, A owns T, not T spoiled", "no T broken", (
        "{A} took some glue and mended {T}.",
        "{A} worked all evening and mended {T}.",
        "So {A} mended {T} with a piece of string.",
        "With a bit of wood and some glue {A} mended {T}.",
        "In the evening {A} sat down and mended {T}."),
        moods=("A glad proud: {A} had mended {T} | {T:the} was whole again",), weight=0.8),
    Event("fail_mend", "plot", "T broken, A has T, A owns T, not T hope, not T spoiled",
          "T spoiled", (
        "{A} tried to mend {T}, but it did not hold.",
        "{A} tried everything, but {T} could not be mended.",
        "There were too many pieces, and {A} could not mend {T}.",
        "{A} had no glue, and so {A} could not mend {T}.",
        "\"Nobody can mend {T:the},\" said {A:name}."),
        moods=("A sad: {T:the} could not be mended",), weight=0.3),
    Event("help_mend", "plot", "T broken, A has T, A owns T, A with B, not T hope",
          "no T broken, A owes B, B helped A", (
        "{B} mended {T} for {A:him}.",
        "{B} helped {A:him} to mend {T}.",
        "\"Give it to me,\" said {B:name} to {A:him} and mended {T}.",
        "{B} was good with {B:his} hands and mended {T} for {A:him}.",
        "{B} got some glue, and they mended {T} together."),
        moods=("A glad: {B} had mended {T} for {A:him} | {T:the} was whole again",
               "B proud: {B} had helped {A:him}"), weight=1.2),
    Event("muddy", "plot", "A has T, A owns T, A at P, calm, not washed T", "T dirty", (
        "Then {T} fell into the mud.",
        "{A} fell down {P:at}, and {T} was full of mud.",
        "{A} jumped over a puddle {P:at}, and {T} fell into it.",
        "{A} dropped {T} into some mud.",
        "It was wet {P:at}, and {T} got very dirty."),
        moods=("A sad: {T:the} was dirty",), weight=0.4),
    Event("wash", "plot", "T dirty, A has T, A owns T", "no T dirty, washed T", (
        "{A} washed {T} until it was clean again.",
        "So {A} cleaned {T} with water.",
        "{A} got some water and cleaned {T}.",
        "{A} rubbed {T} with grass until all the mud was gone.",
        "With a wet cloth {A} made {T} clean again."),
        moods=("A glad: {T:the} was clean again",)),
    Event("wash_for", "plot", "T dirty, A has T, A owns T, A with B",
          "no T dirty, washed T, A owes B, B helped A", (
        "{B} helped {A:him} to clean {T}.",
        "{B} washed {T} for {A:him}.",
        "{B} brought some water, and they cleaned {T} together.",
        "\"I will help you,\" said {B:name} to {A:him} and cleaned {T}.",
        "{B} took a cloth and made {T} clean for {A:him}."),
        moods=("A glad: {B} had cleaned {T} for {A:him} | {T:the} was clean again",), weight=1.5),
    Event("idea", "plot", "A has T, A owns T, calm, not painted T", "A idea T", (
        "{A} thought that {T} could look better.",
        "But {A} did not like the colour of {T}.",
        "One day {A} wanted to give {T} a new colour.",
        "{A} still had an old pot of paint.",
        "\"This {T:noun} needs some paint,\" said {A:name}."), weight=0.5),
    Event("paint", "plot", "A idea T, A has T", "no A idea T, painted T C", (
        "So {A} painted {T} {C}.",
        "{A} took a brush and painted {T} {C}.",
        "{A} liked {C} best and painted {T} {C}.",
        "With a pot of {C} paint {A} made {T} {C}.",
        "{A} painted {T} {C} from top to bottom."),
        moods=("A proud glad: {T:the} looked like new | {A} had painted {T} so well",)),
)

LOSSES = (
    Event("forget", "plot", "A has T, A owns T, A at P, calm",
          "no A has T, no A at P, A at home, T lies P, A lost T", (
        "{A} went home, but {A} forgot {T} {P:at}.",
        "In the evening {A} ran home and left {T} {P:at}.",
        "When {A} went home, {A} left {T} {P:at}.",
        "It got late, and {A} ran home and forgot {T} {P:at}.",
        "{A} was called home and left {T} lying {P:at}."), weight=0.6),
    Event("drop", "plot", "A has T, A owns T, A at P, calm",
          "no A has T, T lies P, A lost T", (
        "{A} lost {T} {P:at} and did not notice it.",
        "Somewhere {P:at} {T} fell out of {A:his} bag.",
        "{P:at} {T} fell out of {A:his} pocket, but {A} did not notice it.",
        "{A} put {T} down {P:at} and could not find it again.",
        "{A} played with a ball {P:at} and did not see that {T} fell on the ground."), weight=0.5),
    Event("blow", "plot", "windy, A has T, A owns T, A at W, calm",
          "no A has T, T lies P, A lost T, A missed T, A saw P", (
        "Suddenly the wind blew {T} {P:to}.",
        "The wind took {T} out of {A:his} hands and carried it {P:to}.",
        "The wind was so strong that {T} flew {P:to}.",
        "Then the wind caught {T} and blew it {P:to}.",
        "{A} did not hold {T} tight, and the wind carried it {P:to}."),
        moods=("A sad: the wind had taken {T} away",), weight=2),
    Event("miss", "plot", "A lost T, not A missed T", "A missed T", (
        "Soon {A} saw that {T} was gone.",
        "{A} wanted to {T:use} {T}, but it was gone.",
        "\"Where is my {T:noun}?\" asked {A:name}.",
        "Then {A} noticed that {A} no longer had {T}.",
        "\"{T:The} is gone!\" shouted {A:name}."),
        moods=("A sad scared: {T:the} was gone | {A} had lost {T}",), weight=2),
    Event("look", "plot", "A missed T, A at W, T lies P, not A saw *, not A sought T",
          "A sought T", (
        "{A} looked for {T} everywhere.",
        "{A} looked under the bed and behind the door, but {T} was not there.",
        "{A} turned the whole house upside down, but {A} could not find {T}.",
        "All evening {A} looked for {T}.",
        "{A} asked everybody about {T}, but nobody had seen it."), weight=1.5),
    Event("go_back", "plot", "A missed T, T lies P, A at W, not A mourns T", "no A at W, A at P", (
        "So {A} ran {P:to} to look for {T}.",
        "{A} thought for a while and went back {P:to}.",
        "At once {A} ran {P:to}.",
        "\"I must go {P:to} at once,\" said {A:name} and ran off.",
        "{A} hurried {P:to} to get {T}.")),
    Event("find_again", "plot", "A missed T, T lies P, A at P",
          "no A missed T, no A lost T, no T lies P, no A saw P, A has T", (
        "{P:at} {A} found {T} again.",
        "There lay {T}, and {A} picked it up.",
        "{A} looked {P:at} until {A} found {T}.",
        "{A} found {T} {P:at} under a bush.",
        "At last {A} saw {T} lying {P:at} and picked it up."),
        moods=("A glad: {A} had found {T} again | {T:the} was back",), weight=2),
    Event("tell_loss", "plot", "A missed T, A with B, not B knows T, A owns T, not A mourns T",
          "B knows T", (
        "\"I have lost {T:the},\" {A} told {B:him}.",
        "\"Have you seen my {T:noun}?\" {A} asked {B:him}.",
        "{A} told {B:him} that {T} was gone.",
        "{A} ran to {B:him} and told {B:him} about {T}.",
        "\"{B:name}, please help me to find {T:the},\" said {A:name}."), weight=1.5),
    Event("search", "plot", "B knows T, A missed T, A owns T, T lies P, B at W, not A mourns T",
          "no B at W, B at P, no T lies P, B has T, B found T", (
        "{B} ran {P:to} and found {T} there.",
        "So {B} went {P:to}, looked under every bush and found {T}.",
        "{B} went {P:to}, and there lay {T}.",
        "\"I will look {P:at},\" said {B:name}, and there {B} found {T}.",
        "{B} looked for {T} and found it {P:at}."), weight=1.5),
    Event("find_for", "plot", "B at P, T lies P, A lost T, A owns T, not A mourns T",
          "no T lies P, B has T, B found T", (
        "{B} found {T} {P:at}.",
        "{B} saw {T} lying {P:at} and picked it up.",
        "After a while {B} found {T} {P:at}, half hidden under some leaves.",
        "{B} walked around {P:at} and found {T}.",
        "{B} nearly stepped on {T}, which lay {P:at}."), weight=1.5),
    Event("bring", "plot", "B found T, B has T, A owns T, A at W, B at V",
          "no B found T, no B has T, no A lost T, no A missed T, no A saw *, no B at V, B at W, "
          "A has T, A owes B, B helped A", (
        "{B} ran to {A:him} and brought {A:him} {T}.",
        "At once {B} brought {T} back to {A:him}.",
        "Soon {A} had {T} back, for {B} brought it.",
        "Then {B} knocked at {A:name}'s door with {T} in {B:his} hand.",
        "\"I have found your {T:noun},\" said {B:name}, when {B} came to {A:him}."),
        moods=("A glad: {B} had brought {T} back | {B} had found {T}",), weight=3),
    Event("hand_over", "plot", "B found T, B has T, A owns T, A with B",
          "no B found T, no B has T, no A lost T, no A missed T, no A saw *, A has T, A owes B, "
          "B helped A", (
        "{B} gave {T} to {A:him}.",
        "\"Here is your {T:noun},\" said {B:name} to {A:him}.",
        "\"Look what I have found,\" said {B:name} and gave {A:him} {T}.",
        "At once {B} gave {A:him} {T} back.",
        "{B} put {T} into {A:name}'s hands."),
        moods=("A glad: {B} had found {T} | {A} had {T} back",), weight=3),
    Event("keep_found", "plot", "B found T, B has T, A lost T, A owns T, not B knows T",
          "no B found T, B took A T, no A lost T, no A missed T", (
        "{B} put {T} into {B:his} bag and told nobody.",
        "{B} knew that {T} was not {B:his} own, but {B} kept it.",
        "But {B} did not tell {A:him} and kept {T}.",
        "But {B} wanted to keep {T} and hid it under {B:his} coat.",
        "{B} said nothing to {A:him} and kept {T}."), weight=0.7),
    Event("give_up", "plot", "A sought T, A missed T, A owns T, T lies P, not A at P, not A saw *",
          "A mourns T", (
        "But {A} never looked {P:at}, where {T} was.",
        "In the end {A} stopped looking, and {T} lay {P:at}.",
        "Nobody thought of looking {P:at}, where {T} was.",
        "But {T} lay {P:at}, and {A} did not look there.",
        "{A} looked for three days, but never {P:at}, where {T} lay."), weight=0.6),
)

HIDING = (
    Event("hide", "plot", "B wants T, A has T, A owns T, A with B, whole T",
          "no B wants T, A refused B T, no A has T, A hid T, T lies P", (
        "{A} hid {T} {P:at}, so that {B} could not take it.",
        "Then {A} went {P:to} and hid {T} there.",
        "So that {B} would not get {T}, {A} hid it {P:at}.",
        "{A} was afraid for {T} and hid it {P:at}.",
        "\"You will never find it,\" {A} told {B:him} and hid {T} {P:at}."), weight=3),
    Event("hunt", "plot", "A hid T, A refused B T, not B hunted T", "B hunted T", (
        "{B} looked for {T} everywhere.",
        "{B} wanted to know where {T} was.",
        "\"Where is {T:the}?\" asked {B:name}.",
        "All day {B} looked for {T}.",
        "{B} asked {A:him} again and again where {T} was."), weight=6),
    Event("hint", "plot", "A hid T, B hunted T, A refused B T, T lies P, A with B",
          "no A refused B T, B told T", (
        "\"Look {P:at},\" said {A:name} at last.",
        "At last {A} told {B:him} to look {P:at}.",
        "\"{T:The} is {P:at},\" said {A:name} to {B:him}.",
        "Then {A} felt sorry and told {B:him} that {T} was {P:at}.",
        "\"If you go {P:to}, you will find {T:the},\" said {A:name} to {B:him}."), weight=6),
    Event("find_hidden", "plot", "B told T, A hid T, A owns T, T lies P, A at W, B at W",
          "no B told T, no A hid T, no T lies P, no A at W, no B at W, A at P, B at P, A has T, "
          "A shared B T, B tried T", (
        "They went {P:to}, got {T} and took turns with it.",
        "So {AB} went {P:to}, and {B} was allowed to {T:use} {T} first.",
        "{B} ran {P:to} and found {T}, and {A} let {B:him} {T:use} it.",
        "{AB} went {P:to} together, and there they shared {T}.",
        "{B} found {T} {P:at}, and {A} came after {B:him} and shared it."),
        moods=("B glad: {B} had found {T} | {B} could {T:use} {T}",), weight=6),
    Event("find_secretly", "plot", "A hid T, A refused B T, B hunted T, T lies P, B at W",
          "no A hid T, no A refused B T, no T lies P, B has T, B took A T", (
        "{B} found {T} {P:at} and took it without asking.",
        "When {A} was asleep, {B} went {P:to} and took {T}.",
        "{B} looked {P:at}, found {T} and ran away with it.",
        "But {B} was clever, found {T} {P:at} and kept it.",
        "In the night {B} took {T} out of its place {P:at}."),
        moods=("A angry sad: {B} had taken {T}",), weight=2),
    Event("fetch", "plot", "A hid T, A refused B T, T lies P, A with B",
          "no A hid T, no A refused B T, no T lies P, A has T, A shared B T, B tried T", (
        "In the end {A} got {T} from its place {P:at} and shared it with {B:him}.",
        "But {T} was no use {P:at}, so {A} got it and shared it with {B:him}.",
        "Then {A} felt sorry, brought {T} back from {P:the} and let {B:him} {T:use} it.",
        "\"Come {P:to}, {T:the} is there,\" said {A:name} to {B:him} at last, and they shared it.",
        "{A} went {P:to}, took {T} and came back to share it with {B:him}."), weight=1),
)

ANIMALS_COME = (
    Event("snatch", "plot", "A has T, A owns T, A at W, calm, not beast",
          "beast, no A has T, X has T, X at P, X snatched T", (
        "Suddenly {X:a} came, took {T} and ran {P:to}.",
        "Then {X:a} grabbed {T} and ran {P:to} with it.",
        "But {X:a} pulled {T} out of {A:his} hands and ran {P:to}.",
        "{A} put {T} down, and at once {X:a} ran {P:to} with it.",
        "Out of nowhere came {X:a} and carried {T} {P:to}."),
        moods=("A sad angry: {X} had taken {T}",
               "A scared: {X} was so big and wild"), weight=1),
    Event("chase", "plot", "X snatched T, A owns T, X at P, A at W, not X away",
          "no A at W, A at P", (
        "{A} ran after {X} {P:to}.",
        "{A} followed {X} {P:to}.",
        "\"Stop!\" shouted {A:name} and ran after {X} {P:to}.",
        "As fast as {A} could, {A} ran {P:to} after {X}.",
        "{A} was not afraid of {X} and hurried {P:to}."), weight=1.5),
    Event("chase_for", "plot", "X snatched T, not X away, A owns T, X at P, A at W, B at W",
          "no B at W, B at P", (
        "{B} ran after {X} {P:to}.",
        "\"I will get it back,\" said {B:name} and ran {P:to} after {X}.",
        "{B} wanted to help {A:him} and followed {X} {P:to}.",
        "{A} was too slow, but {B} followed {X} {P:to}.",
        "\"Wait here,\" {B} told {A:him} and ran {P:to} after {X}.")),
    Event("outrun", "plot", "X snatched T, A owns T, X at P, not X fed, not X away", "X away", (
        "{X} was too fast for {A:him} and ran off with {T}.",
        "{A} ran after {X}, but it was too fast and kept {T}.",
        "{A} shouted, but {X} did not stop and disappeared with {T}.",
        "{X} looked back at {A:him} and ran away with {T}.",
        "{A} threw a stone at {X}, but it ran on with {T}."),
        moods=("A sad: {X} had got away with {T}",), weight=0.5),
    Event("feed", "plot", "X snatched T, not X away, X at P, B at P, not X fed", "X fed", (
        "{B} held out some bread to {X}.",
        "{B} had some bread in {B:his} bag and fed {X}.",
        "{B} gave {X} an apple.",
        "{P:at} {B} threw some cheese to {X}.",
        "\"Are you hungry?\" {B} asked {X} and gave it some cheese.")),
    Event("regain", "plot", "X snatched T, not X away, A owns T, X at P, A at P, X has T",
          "no X snatched T, not X away, no X has T, A has T", (
        "{A} caught {X} {P:at} and took {T} back.",
        "{X} let {T} fall, and {A} picked it up.",
        "{P:at} {A} pulled {T} out of its mouth.",
        "{X} got tired, and {A} got {T} back.",
        "{A} clapped {A:his} hands, and {X} ran away and left {T} {P:at}, where {A} picked it up."),
        moods=("A glad: {A} had {T} back | {A} had got {T} back from {X}",
               "A proud: {A} had caught {X}"), weight=1.5),
    Event("regain_for", "plot",
          "X snatched T, not X away, A owns T, X at P, B at P, X has T, not A at P",
          "no X snatched T, not X away, no X has T, B has T, B found T", (
        "{B} caught {X} {P:at} and took {T} out of its mouth.",
        "{X} let {T} fall, and {B} picked it up.",
        "{P:at} {B} got {T} from {X}.",
        "{X} got tired, and {B} could take {T}.",
        "{B} shouted at {X} until it left {T} {P:at} and ran away, and {B} picked {T} up."),
        weight=1.5),
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
        moods=("A glad proud: {A} had saved {X} | {X} was free again",), weight=3),
    Event("rescue_for", "plot", "X stuck, X at P, A at P, A owns T, B at P",
          "no X stuck, X friend A, A owes B, B helped A", (
        "{AB} saved {X} together.",
        "{A} called {B:him}, and together they set {X} free.",
        "{B} held {X}, and {A} set it free.",
        "\"We must help it,\" said {A:name} to {B:him}, and they got {X} out.",
        "{A} could not do it alone, but with {B:him} {A:he} set {X} free."),
        moods=("A glad: {X} was free again",)),
    Event("repay", "plot", "X friend A, A missed T, T lies P, A at W, A owns T, not A mourns T",
          "no A missed T, no A lost T, no A saw *, no T lies P, A has T, X at W", (
        "{X} ran {P:to} and came back with {T} in its mouth.",
        "Then {X} came and brought {A:him} {T} from {P:the}.",
        "{X} had found {T} {P:at} and carried it to {A:him}.",
        "But {X} had seen {T} {P:at} and brought it to {A:him}.",
        "{X} wanted to thank {A:him} and got {T}, which lay {P:at}."),
        moods=("A glad: {X} had found {T} | {A} had {T} back",), weight=12),
)

SLEEPING = (
    Event("sleep", "plot", "A has T, A owns T, A with B, calm, not two",
          "A asleep", (
        "{A} was tired and fell asleep beside {T}.",
        "{A} lay down, put {T} beside {A:him} and slept.",
        "After lunch {A} fell asleep with {T} in {A:his} arms.",
        "It was so warm and quiet that {A} fell asleep and dropped {T}.",
        "{A} closed {A:his} eyes, and soon {A} was asleep with {T} beside {A:him}."), weight=4),
    Event("take_asleep", "plot", "A asleep, A has T, A owns T, A with B",
          "no A has T, B has T, B took A T", (
        "{B} saw that {A} was asleep and took {T}.",
        "While {A} slept, {B} took {T}.",
        "{B} waited until {A} slept well and stole {T}.",
        "Without a sound {B} took {T} out of {A:his} arms.",
        "{B} came on tiptoe and took {T} away from {A:him}.")),
    Event("hide_asleep", "plot", "A asleep, A has T, A owns T, A at W, B at W",
          "no A has T, T lies P, A lost T, B hid T", (
        "While {A} slept, {B} hid {T} {P:at}.",
        "For fun {B} took {T} and hid it {P:at}.",
        "{B} wanted to play a trick and hid {T} {P:at}.",
        "{B} laughed, took {T} from {A:him} and hid it {P:at}.",
        "\"{A:name} will be surprised,\" said {B:name} and hid {T} {P:at}."), weight=1.5),
    Event("wake", "plot", "A asleep, A owns T, not A has T",
          "no A asleep, A missed T", (
        "When {A} woke up, {T} was gone.",
        "{A} opened {A:his} eyes and did not see {T} any more.",
        "A noise woke {A:him}, and {T} was no longer there.",
        "Then {A} woke up and asked: \"Where is my {T:noun}?\"",
        "At last {A} woke up and could not find {T}."),
        moods=("A sad scared: {T:the} was gone",), weight=3),
    Event("tell_trick", "plot", "B hid T, A missed T, A owns T, T lies P, A with B",
          "no B hid T, A saw P", (
        "\"I hid {T:the} {P:at},\" said {B:name} and laughed.",
        "\"Go {P:to}, and you will find it,\" said {B:name} to {A:him}.",
        "{B} told {A:him} that {T} was {P:at}.",
        "\"Look {P:at}, it was only a trick,\" said {B:name} to {A:him}.",
        "{B} could not keep the secret and told {A:him} to look {P:at}."), weight=3),
)

MEETINGS = (
    Event("invite", "plot", "A has T, A owns T, A at home, B at home, calm, not went, "
                            "not went together",
          "A invited B P, went", (
        "\"Will you come {P:to} tomorrow, {B:name}?\" asked {A:name}.",
        "{A} asked {B:him} to come {P:to} the next day.",
        "\"Meet me {P:at} in the afternoon,\" said {A:name} to {B:him}.",
        "\"Let us {T:use} {T:the} {P:at} tomorrow,\" said {A:name} to {B:him}.",
        "{A} wanted to meet {B:him} {P:at} and show {B:him} {T}."), weight=5),
    Event("accept", "plot", "A invited B P", "no A invited B P, B coming A P", (
        "\"Yes, I will come,\" {B} promised.",
        "{B} promised to be {P:at} in time.",
        "\"You can count on me,\" said {B:name} to {A:him}.",
        "{B} gave {B:his} word to come {P:to}.",
        "\"I will be there,\" said {B:name}.")),
    Event("wait", "plot", "B coming A P, A has T, A at W", "no A at W, A at P, A awaits B", (
        "{A} waited {P:at} with {T}.",
        "{A} took {T} and went {P:to} to wait for {B:him}.",
        "The next day {A} sat {P:at} with {T} and waited for {B:him}.",
        "{A} was {P:at} early and waited with {T}.",
        "So {A} carried {T} {P:to} and waited."), weight=3),
    Event("arrive", "plot", "B coming A P, A awaits B, A at P, B at W",
          "no B coming A P, no A awaits B, no B at W, B at P, A hosts B", (
        "{B} kept {B:his} word and came {P:to}.",
        "Soon {B} came {P:to}, as {B} had promised.",
        "After a short time {A} saw {B:him} come {P:to}.",
        "\"Here I am!\" shouted {B:name} and ran {P:to}.",
        "{B} was in time, and so they met {P:at}."),
        moods=("A glad: {B} had come | {B} had kept {B:his} word",), weight=2),
    Event("enjoy", "plot", "A hosts B, A has T, A owns T, A with B",
          "no A hosts B, A shared B T, B tried T", (
        "{AB} took turns with {T} all afternoon.",
        "{A} let {B:him} {T:use} {T} first.",
        "\"Now we can {T:use} {T:the},\" said {A:name} to {B:him}, and so they did.",
        "{AB} began to {T:use} {T} at once.",
        "{B} was allowed to {T:use} {T} as often as {A}."),
        moods=("B glad: {B} could {T:use} {T} | {A} had shared {T} with {B:him}",), weight=6),
    Event("stay_away", "plot", "B coming A P, A awaits B, A at P, B at W",
          "no B coming A P, no A awaits B, A alone", (
        "But {B} forgot it and did not come {P:to}.",
        "{A} waited until it was dark {P:at}, but {B} did not come.",
        "But {B} stayed in bed, and {A} was alone {P:at}.",
        "But nobody came {P:to}, for {B} had forgotten it.",
        "Hours went by {P:at}, but {B} did not come."),
        moods=("A sad angry: {B} had not come | {B} had forgotten to come",), weight=1.2),
    Event("excuse", "plot", "A alone, A at P, A owns T, B at W, B person",
          "no A alone, no B at W, B at P, B begged A T", (
        "In the evening {B} came {P:to} and said that {B} was sorry.",
        "\"I am sorry that I am so late,\" said {B:name}, when {B} came {P:to}.",
        "At last {B} ran {P:to} and asked {A:him} to forgive {B:him}.",
        "Much later {B} came {P:to} and said: \"I am sorry, {A:name}.\"",
        "When {B} remembered it, {B} ran {P:to} and said sorry to {A:him}."), weight=2),
)

SIDE = (
    Event("thank", "side", "B owes A", "no B owes A", (
        "{B} thanked {A:him}.",
        "\"Thank you, {A:name}!\" said {B:name}.",
        "\"You are a real friend, {A:name},\" said {B:name}.",
        "\"How can I thank you?\" {B} asked {A:him}.",
        "{B} hugged {A:him} and thanked {A:him} again and again.")),
    Event("comfort", "side", "A sad, A with B, not B refused A *, not B took A *", "no A sad", (
        "\"Do not be sad, {A:name},\" said {B:name}.",
        "{B} sat down beside {A:him} and held {A:his} hand.",
        "{B} tried to cheer {A:him} up.",
        "\"Everything will be all right,\" said {B:name} to {A:him}.",
        "{B} hugged {A:him} and dried {A:his} tears.")),
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
        "From that day on {AB} shared everything, and most of all {T}.",
        "And so {AB} had more fun with {T} than ever before.",
        "Since that day {T} has belonged to both of them.",
        "In the evening {A} took {T} home, and {B} went with {A:him}."), weight=3),
    Event("end_carry", "end", "A has T, A owns T, A at P, calm", "end", (
        "In the evening {A} carried {T} home from {P:the}.",
        "Then {A} left {P:the} and took {T} home.",
        "At last {A} went home from {P:the} with {T} under {A:his} arm.",
        "When it got dark {P:at}, {A} took {T} home.",
        "{A} never forgot that day {P:at} with {T}."), weight=1.5),
    Event("end_friends", "end", "A friends B, A has T, A owns T, calm", "end", (
        "{AB} stayed friends, and {A:name} kept {T}.",
        "From that day on {AB} never quarreled about {T} again.",
        "So {A:name} had {T} and still had {B:name} as a friend.",
        "In the evening {AB} laughed about it, and {T} lay beside {A:name}.",
        "And the next time {A:name} and {B:name} were both allowed to {T:use} {T:the}."), weight=3),
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
        "In the end {A} had {T} and a friend who kept {B:his} word."), weight=2),
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
    Event("end_lost", "end", "A mourns T, A lost T, T lies P, calm but lost missed hid", "end", (
        "So {A} had lost {T} for good.",
        "{A} never saw {T} again.",
        "And {T} still lies {P:at} today.",
        "And if nobody has found {T}, it still lies {P:at}.",
        "{A} often dreamed of {T}, but it never came back."), weight=8),
    Event("end_snatched", "end", "X away, X snatched T, A owns T, X at P, calm but snatched",
          "end", (
        "Nobody ever saw {X} or {T} again.",
        "{A} never got {T} back from {X}.",
        "And so {X} has {T} to this day.",
        "{A} could not find {X} any more, and {T} was lost for good.",
        "And {X} still plays with {T} {P:at} today."), weight=0.3),
    Event("end_broken", "end", "T spoiled, T broken, A has T, A owns T, calm but broken", "end", (
        "Nobody could mend {T}, and {A} kept the pieces in a drawer.",
        "So {T} was broken for good.",
        "{A} never had {T:a} again.",
        "{A} put the pieces of {T} into a bag and buried them.",
        "And {T} was never whole again."), weight=0.4),
    Event("end_kept", "end", "B forgot T, B promised A T, calm but promised lent", "end", (
        "{B} never brought {T} back, and {A} never lent {B:him} anything again.",
        "{A} never saw {T} again, and {A} did not trust {B:him} any more.",
        "{T} stayed with {B:him}, and {A} learned to whom one can lend things.",
        "To this day {B} has {T}, and {A} is still waiting for it.",
        "So {B} kept {T}, but {B} lost {A:him} as a friend."), weight=0.2),
    Event("end_thief", "end", "B denied T, B took A T, B has T, A owns T, calm but took", "end", (
        "{B} kept {T}, but {A} never spoke to {B:him} again.",
        "{A} never found out who had {T}, and {B} was never happy with it.",
        "So {B} had {T}, but {A} was no longer {B:his} friend.",
        "{B} still has {T}, and {A} still wants it back.",
        "{A} never got {T} back from {B:him}."), weight=0.5),
    Event("end_cross", "end", "A cross B T, A has T, A owns T, calm but cross", "end", (
        "{A} kept {T}, but {B} was not {A:his} friend any more.",
        "So {A} had {T} again, but {A} had lost {B:him} as a friend.",
        "{AB} never spoke to each other again, and {T} stayed with {A:name}.",
        "Since then {A} plays alone with {T}, and {B} plays alone, too.",
        "In the end {A} had {T}, but no friend to play with, for {B} stayed away."), weight=0.3),
    Event("end_refused", "end", "A refused B T, A has T, calm but refused", "end", (
        "So {A} kept {T}, but {B} never asked {A:him} again.",
        "{B} went home without {T}, and {A} was alone with it.",
        "In the end {A} still had {T}, but {B} did not come back to play.",
        "{A} had {T} to play with, but nobody to play with, for {B} had gone home.",
        "And {B} never got {T} from {A:him}."), weight=0.2),
)

BASIC = (OPENINGS + INTRODUCTIONS + QUIET + WISHES + PROMISES + WRONGS + MISHAPS + LOSSES + HIDING
         + ANIMALS_COME + SLEEPING + MEETINGS + SIDE + ENDINGS)


def feelings(event):
    """The side events that tell how somebody felt after an event: a row for each of its moods."""
    for line in event.moods:
        who, why = line.split(":", 1)
        role, *moods = who.split()
        clauses = [clause.strip() for clause in why.split("|")]
        fact = feeling_fact(event, line)
        for mood in moods:
            then = f"no {fact}"
            if mood == "sad":
                then = f"{then}, {role} sad"
            yield Event(f"{event.name}_{role}_{mood}", "side", fact, then,
                        mood_ways(role, mood, clauses))


def feeling_fact(event, line):
    """The fact that somebody feels something after an event, with all whom the reasons name:
    "B feels lend_B A T"."""
    who, why = line.split(":", 1)
    role = who.split()[0]
    others = sorted(set(re.findall(r"{([A-Z])", why)) - {role})
    return " ".join([role, "feels", f"{event.name}_{role}", *others])


def mood_ways(role, mood, clauses):
    """The sentences that tell the mood of a role, with and without the clauses that say why."""
    words, acts = MOODS[mood]
    ways = [fill(frame, mood=word) for frame in FRAMES_ALONE for word in words]
    ways += [fill(frame, mood=words[0], act=act) for frame in FRAMES_OF_BOTH for act in acts]
    for why in clauses:
        ways += [fill(frame, mood=word, why=why) for frame in FRAMES_WITH_WHY for word in words]
        ways += [fill(frame, act=act, why=why) for frame in FRAMES_WITH_ACT for act in acts]
    return tuple(way.replace("{W", f"{{{role}") for way in ways)


def fill(frame, **parts):
    """A frame with some of its slots filled; the others stay."""
    for name, part in parts.items():
        frame = frame.replace(f"{{{name}}}", part)
    return frame


EVENTS = BASIC + tuple(mood for event in BASIC for mood in feelings(event))
