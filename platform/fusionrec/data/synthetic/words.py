"""The vocabulary of the synthetic catalogue: what each topic sounds like in films, books and music.

A topic is never named by one fixed word. ``matters`` and ``acts`` (films, books) and ``sounds``
(music) speak of it in different words, some plain and some oblique, and a style shows only in the
tone of an adjective, so that a pretrained encoder sees part of the likeness and fine-tuning on
histories can teach it the rest.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topic:
    """A theme that items are about and users like."""

    name: str
    genre: str
    """The coarse label in ``categories``; several topics share one."""
    nouns: tuple[str, ...]
    """For titles."""
    matters: tuple[str, ...]
    """Noun phrases: what the work is about."""
    acts: tuple[str, ...]
    """What a hero does: third person singular."""
    sounds: tuple[str, ...]
    """Noun phrases: what is heard on a record."""


def _words(alternatives: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in alternatives.split("|"))


def _topic(name: str, genre: str, nouns: str, matters: str, acts: str, sounds: str) -> Topic:
    return Topic(name, genre, _words(nouns), _words(matters), _words(acts), _words(sounds))


TOPICS: tuple[Topic, ...] = (
    _topic(
        "heist",
        "Crime",
        "Vault|Getaway|Safecracker|Score|Combination|Alibi|Ledger",
        "a vault beneath the old opera|a crew that trusts nobody|the perfect burglary"
        "|stolen diamonds"
        "|a getaway that goes wrong|a forged floor plan|eleven minutes before the guards return",
        "plans one last job|assembles thieves for an impossible theft"
        "|opens a safe and finds it empty"
        "|sells out a partner after the robbery",
        "tyres on wet asphalt|a walking bass that tiptoes past the guards|a ticking hi-hat"
        "|finger snaps in an empty bank|horns that run for the door",
    ),
    _topic(
        "desert",
        "Adventure",
        "Dune|Oasis|Caravan|Mirage|Salt Road|Well|Horizon",
        "a caravan lost among the dunes|thirst and heat|a well that three tribes claim"
        "|the long walk across the sand|a mirage that everyone sees|camel drivers and star charts",
        "crosses a burning waste on foot|guides strangers from oasis to oasis|maps an empty quarter"
        "|buries a canteen where no one will look",
        "dry wind over an open string|hand drums at a campfire|a flute that shimmers like heat"
        "|a slow camel gait in the bass|sand poured over a snare",
    ),
    _topic(
        "grief",
        "Drama",
        "Mourning|Empty Chair|Elegy|Ashes|Absence|Last Letter|Condolence",
        "the year after a funeral|a widow and her silence|letters to someone who has died"
        "|an urn on the kitchen shelf|sorrow that will not be hurried|what is left in the wardrobe",
        "returns home to bury a brother|learns to live with a loss|keeps a dead man's phone charged"
        "|writes an obituary again and again",
        "a cello that cannot finish its phrase|long rests between piano notes"
        "|a voice close to tears"
        "|organ chords from the back pew|a lullaby sung to nobody",
    ),
    _topic(
        "dragons",
        "Fantasy",
        "Dragon|Wyrm|Scale|Ember Crown|Hoard|Wing|Rider",
        "dragons and the people who ride them|a hoard under the mountain|the last egg of its kind"
        "|an oath sworn in fire|a sorcerer without a tongue|winged shadows over the keep",
        "hatches something that breathes fire|steals a crown from a sleeping wyrm"
        "|learns forbidden magic"
        "|swears to slay the beast and befriends it",
        "war horns and choirs|bellows like enormous lungs|a harp in a stone hall"
        "|cymbals that hiss like scales|a bard's refrain in a lost tongue",
    ),
    _topic(
        "sea",
        "Adventure",
        "Tide|Lighthouse|Anchor|Schooner|Undertow|Harbour|Keel",
        "a ship that never reached port|mutiny in the doldrums|a lighthouse keeper's logbook"
        "|the whale and its hunters|storms off the cape|a wreck that the divers keep returning to",
        "signs on with a doomed whaler|sails alone around the cape|dives for a sunken cargo"
        "|reads the waves and keeps the crew alive",
        "shanties for rough voices|an accordion on a swaying deck|foghorns tuned to a fifth"
        "|gulls and creaking rope|rolling drums like a swell",
    ),
    _topic(
        "space",
        "Science Fiction",
        "Orbit|Starship|Perihelion|Airlock|Nebula|Colony|Lightyear",
        "a generation ship far from any star|the first colony on a red moon"
        "|a signal from deep space"
        "|weightless years|an airlock that opens by itself|astronauts who age at different speeds",
        "wakes from cold sleep a century early|repairs a drifting station|charts a silent galaxy"
        "|waits for an answer from beyond the heliopause",
        "slow synthesiser drones|radio static between the planets|arpeggios that orbit one note"
        "|a countdown in the left channel|vast reverb without a horizon",
    ),
    _topic(
        "war",
        "Historical",
        "Trench|Regiment|Armistice|Barrage|Sentry|Siege|Frontline",
        "soldiers in a ruined village|a siege in its third winter|letters from the front"
        "|the morning after the armistice|a deserter and the patrol behind him|mud, wire and fear",
        "leads a platoon through no man's land|carries messages between the trenches"
        "|refuses an order to fire|comes back from the front a stranger",
        "snare rolls on parade|a bugle far behind the lines|boots in step|a hymn under bombardment"
        "|morse code against a drone",
    ),
    _topic(
        "kitchen",
        "Comedy",
        "Recipe|Saffron|Sourdough|Table for Two|Broth|Pantry|Salt",
        "a restaurant on the edge of ruin|a grandmother's dumplings|rival chefs"
        "|the secret of a sauce"
        "|hungry guests and burnt pans|a bakery that opens before dawn",
        "inherits a failing bistro|cooks a banquet for an enemy|stakes everything on one menu"
        "|learns to bake from a stern old master",
        "clattering pans as percussion|a sizzling shaker groove|toasts and clinking glasses"
        "|brass as thick as gravy|a singer ordering dessert",
    ),
    _topic(
        "court",
        "Crime",
        "Verdict|Witness|Objection|Jury|Testimony|Appeal|Oath",
        "a murder trial|a juror who will not be moved|a witness who lies well|an innocent defendant"
        "|the price of a verdict|a lawyer with a guilty client",
        "defends a man whom nobody believes|cross-examines an old friend|reopens a settled case"
        "|sits on a jury of cowards",
        "a gavel on the backbeat|call and response like cross-examination"
        "|spoken testimony over strings"
        "|a choir of twelve|a stern baritone passing sentence",
    ),
    _topic(
        "ghosts",
        "Horror",
        "Haunting|Séance|Cellar|Revenant|Whisper|Attic|Apparition",
        "a house that remembers|footsteps above an empty room|a séance that works too well"
        "|the dead who want something back|a child's drawing of a stranger|a locked nursery",
        "spends the night in a haunted manor|hears a voice behind the wallpaper"
        "|digs up an old curse"
        "|photographs something that is not there",
        "a music box winding down|breath on the microphone|detuned strings in a stairwell"
        "|a theremin at midnight|knocks with no rhythm",
    ),
    _topic(
        "romance",
        "Romance",
        "Valentine|Second Chance|Love Letter|Wedding|Heartbeat|Rendezvous|Promise",
        "two strangers on the same train|an old flame who comes back|a marriage of convenience"
        "|first love and bad timing|a kiss at the wrong wedding|the courage to propose",
        "falls for a rival|misses the last train and meets a soulmate"
        "|writes love letters for a friend"
        "|runs from the altar twice",
        "a slow dance in three-four time|duets that finish each other's lines"
        "|brushed drums and sighs"
        "|strings that swoon|a crooner leaning into the vowel",
    ),
    _topic(
        "mountain",
        "Adventure",
        "Summit|Avalanche|Ridge|Base Camp|Glacier|North Face|Rope",
        "a rope team on the north face|thin air and frostbite|the ridge that killed her father"
        "|an avalanche above the hut|rescue at eight thousand metres"
        "|a guide who counts the missing",
        "climbs without oxygen|turns back below the peak|searches the glacier for a lost friend"
        "|hauls a stranger down from the col",
        "alphorns across a valley|crampons on ice as percussion|yodels that come back late"
        "|thin high strings|a drum like falling stones",
    ),
    _topic(
        "robots",
        "Science Fiction",
        "Automaton|Circuit|Android|Turing Street|Clockwork|Protocol|Machine",
        "a machine that asks to be believed|androids in domestic service|code that writes itself"
        "|the last programmer|a robot raised as a daughter|an algorithm that knows too much",
        "builds a mind and cannot switch it off|hunts a runaway android|is replaced by a copy"
        "|teaches a computer to lie",
        "vocoder harmonies|servo motors in strict time|glitches and bit-crushed handclaps"
        "|a drum machine left running|sixteen steps, no mercy",
    ),
    _topic(
        "circus",
        "Drama",
        "Trapeze|Ringmaster|Greasepaint|Big Top|Acrobat|Encore|Carousel",
        "a travelling circus|the knife thrower and his target|acrobats without a net"
        "|a clown who is not amused|backstage jealousies|elephants, sawdust and debts",
        "runs away with the big top|walks the high wire for a bet|keeps a failing show on the road"
        "|replaces a star on opening night",
        "a calliope gone slightly sour|oom-pah tubas|a drum roll before the leap"
        "|applause as an instrument"
        "|a waltz for tightrope",
    ),
    _topic(
        "spies",
        "Thriller",
        "Cipher|Double Agent|Dead Drop|Checkpoint|Mole|Passport|Microfilm",
        "a mole in the service|a code that nobody can break|the exchange on the bridge"
        "|false passports|a handler who knows too little|secrets carried across the border",
        "goes undercover in a hostile capital|decodes a message meant for the enemy"
        "|burns an identity"
        "|waits at a dead drop that is being watched",
        "a twanging guitar in a trench coat|vibraphone in a hotel bar"
        "|tape hiss and numbers read aloud"
        "|stealthy bongos|a muted trumpet round the corner",
    ),
    _topic(
        "farm",
        "Drama",
        "Harvest|Orchard|Furrow|Barn|Almanac|Meadow|Scarecrow",
        "a family farm and the bank that wants it|the drought and the harvest|an orchard in dispute"
        "|sheepdogs, fences and neighbours|a barn raised in a day|the slow seasons of the land",
        "takes over the old homestead|ploughs a field that was promised to another"
        "|breeds horses again"
        "|sells the herd and regrets it",
        "fiddle and banjo on a porch|a lap steel at sundown|crickets between the verses"
        "|hoedown handclaps"
        "|close harmony over hay bales",
    ),
    _topic(
        "jazz",
        "Music and Nightlife",
        "Midnight Club|Saxophone|Neon|Blue Note|Speakeasy|Last Set|Smoke",
        "a trumpeter who burns too brightly|a nightclub after closing time|musicians on the road"
        "|gin, smoke and improvisation|a pianist with two names|neon rain on the boulevard",
        "plays the last set for an empty room|bets a saxophone at cards|opens a speakeasy"
        "|chases a melody through the night",
        "swinging brushes|a smoky saxophone solo|scat over walking bass|blue notes at closing time"
        "|a piano trio in no hurry",
    ),
    _topic(
        "sport",
        "Sport",
        "Final Round|Knockout|Marathon|Underdog|Dugout|Extra Time|Champion",
        "a boxer past his prime|the underdogs of the league|a runner with one lung"
        "|a coach who never praises|the final and its penalty|sweat, tape and early mornings",
        "trains for a title nobody expects|comes back after a bad injury|coaches a hopeless team"
        "|throws the match and cannot sleep",
        "stadium chants|a stomp-and-clap anthem|a skipping rope as metronome"
        "|brass for a victory lap"
        "|a bell and a sprinting beat",
    ),
    _topic(
        "revolution",
        "Historical",
        "Barricade|Manifesto|Uprising|Red Banner|Tyrant|Exile|Strike",
        "a general strike|students on the barricades|the fall of a dictator|a banned newspaper"
        "|exiles who plot in cafés|bread, slogans and betrayal",
        "prints leaflets under curfew|leads an uprising and outlives it|hides a fugitive minister"
        "|votes against the party",
        "marching songs and megaphones|fists on tin drums|a protest ballad in plain chords"
        "|crowds that become a choir|a smuggled anthem",
    ),
    _topic(
        "plague",
        "Thriller",
        "Quarantine|Fever|Contagion|Ward Nine|Antidote|Physician|Outbreak",
        "an epidemic in a walled town|a hospital under quarantine|the search for patient zero"
        "|doctors who run out of beds|a vaccine with a price|masks, rumours and fever charts",
        "tends the sick when others flee|races to isolate a virus|seals the city gates"
        "|forges a certificate of health",
        "a heartbeat monitor in the mix|coughing brass|sterile white noise|a pulse that quickens"
        "|bells from an empty street",
    ),
    _topic(
        "childhood",
        "Family",
        "Treehouse|Summer Holiday|Kite|Paper Boat|Playground|Bicycle|Marbles",
        "the last summer before school|siblings with a secret|a treehouse and its rules"
        "|an imaginary friend|growing up in a small street|a father seen through a child's eyes",
        "moves to a new school and stops speaking|runs away with a little sister"
        "|buries a time capsule"
        "|learns why the grown-ups whisper",
        "toy piano and recorder|a skipping rhyme|playground voices on tape"
        "|glockenspiel in the sunshine"
        "|a bedtime song with a missing verse",
    ),
    _topic(
        "winter",
        "Nature",
        "Wolf|Snowfield|Frost|Tundra|Northern Light|Trapline|Long Night",
        "wolves at the edge of the village|a cabin cut off by snow|a trapper and her dogs"
        "|the polar night|hunger in the frozen north|tracks that stop in the middle of a field",
        "follows a pack across the tundra|survives an arctic winter|befriends a wounded wolf"
        "|waits for the ice to break",
        "bowed glass and frost|howls stretched into chords|sleigh bells far off"
        "|footsteps in deep snow"
        "|a kantele in the dark",
    ),
)

DOMAINS = ("film", "book", "music")
ERAS = (
    "the late Middle Ages",
    "the nineteenth century",
    "the 1920s",
    "the 1970s",
    "the present day",
    "the near future",
)
ERA_LABELS = ("Medieval", "19th Century", "Twenties", "Seventies", "Contemporary", "Futuristic")

STYLES = (
    (_words("Quiet|Patient|Distant"), _words("slow|meditative|unhurried")),
    (_words("Burning|Restless|Wild"), _words("breathless|headlong|frantic")),
    (_words("Crooked|Borrowed|Second"), _words("deadpan|wry|mocking")),
    (_words("Broken|Bitter|Crimson"), _words("brutal|unsparing|raw")),
    (_words("Golden|Forgotten|Little"), _words("tender|gentle|warm")),
    (_words("Silver|Seventh|Velvet"), _words("lavish|ornate|sumptuous")),
    (_words("Narrow|Northern|Plain"), _words("austere|spare|bare")),
    (_words("Hollow|Hidden|Pale"), _words("eerie|dreamlike|uncanny")),
)
"""Of each style: adjectives that its titles favour, and words for its tone."""
ADJECTIVES = tuple(adjective for adjectives, _ in STYLES for adjective in adjectives)
PLACES = _words(
    "Arlen|Bellmoor|Corvo|Dunhaven|Estrel|Farrow Hill|Galt|Hesper|Ilmen|Jorvay|Kestrel Bay|Lorne|"
    "Marisol|Nether Wick|Ostrava Street|Penhallow|Quince Square|Rosmark|Sable Point|Tamsin|Ulveg|"
    "Vesper|Westmarch|Yarrow"
)
FIRST_NAMES = _words(
    "Ada|Bruno|Celia|Dario|Edda|Felix|Greta|Hugo|Ines|Jonas|Kaya|Leon|Mara|Nils|Odile|Pavel|Rosa|"
    "Samir|Thea|Umar|Vera|Wim|Yuki|Zora"
)
LAST_NAMES = _words(
    "Abelard|Brandt|Calloway|Dravic|Ekholm|Fontaine|Grieve|Hallam|Ibarra|Jansson|Kovacs|Lindqvist|"
    "Moreau|Novak|Okafor|Petrov|Quill|Rask|Sato|Tveit|Ueda|Varga|Whitlock|Zeller"
)
ROLES = _words(
    "a night-shift nurse|a disgraced teacher|a clerk with debts|a young translator"
    "|a retired engineer|"
    "a twin who was left behind|an orphan|a former champion|a stubborn widow|a drifter|"
    "a minister's daughter|an apprentice"
)
BANDS = _words(
    "Lanterns|Sparrows|Cartographers|Tenants|Orchards|Pilots|Ushers|Magnets|Ferrymen|Postcards|"
    "Satellites|Gardeners|Mirrors|Tigers|Commuters|Understudies"
)

FILLERS = {
    "film": _words(
        "The final shot has divided audiences.|It was filmed in forty days with a small crew.|"
        "The leads had never met before the first take."
        "|A restored version runs twelve minutes longer.|"
        "Critics praised the camera work.|It opened quietly and found its audience later."
    ),
    "book": _words(
        "This edition comes with a new afterword.|The chapters are short and the nights are long.|"
        "It was translated into nine languages.|A reading group guide is included.|"
        "The last page sends you back to the first.|It won a prize for its prose."
    ),
    "music": _words(
        "It was recorded in one long weekend.|The vinyl pressing comes in a folded sleeve.|"
        "Best heard from beginning to end.|Two of the tracks are live takes.|"
        "The lyrics are printed inside.|It grew out of a residency in a small club."
    ),
}
