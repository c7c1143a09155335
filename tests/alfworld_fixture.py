"""Six small household games, one per task type, for the real ALFWorld engine: made at run time, because domain and
grammar come from the installed alfworld. They are not the published games; scores on them compare with nobody's."""
import json
import os

RECEPTACLES = ["cabinet 1", "cabinet 2", "countertop 1", "desk 1", "drawer 1", "fridge 1", "garbagecan 1",
               "microwave 1", "shelf 1", "sinkbasin 1"]
OPENABLE = {"cabinet", "drawer", "fridge", "microwave"}
PDDL_NAMES = {"countertop": "CounterTop", "garbagecan": "GarbageCan", "sinkbasin": "SinkBasin", "desklamp": "DeskLamp",
              "saltshaker": "SaltShaker"}

# (task type, object, receptacle or lamp, {object: where it lies}, a way to win)
GAMES = [
    ("pick_and_place_simple", "mug", "shelf", {"mug 1": "cabinet 1", "pen 1": "desk 1"},
     ["go to cabinet 1", "open cabinet 1", "take mug 1 from cabinet 1", "go to shelf 1", "move mug 1 to shelf 1"]),
    ("look_at_obj_in_light", "book", "desklamp", {"book 1": "shelf 1", "desklamp 1": "desk 1", "pen 1": "drawer 1"},
     ["go to shelf 1", "take book 1 from shelf 1", "go to desk 1", "use desklamp 1"]),
    ("pick_clean_then_place_in_recep", "plate", "cabinet", {"plate 1": "countertop 1", "mug 1": "desk 1"},
     ["go to countertop 1", "take plate 1 from countertop 1", "go to sinkbasin 1", "clean plate 1 with sinkbasin 1",
      "go to cabinet 2", "open cabinet 2", "move plate 1 to cabinet 2"]),
    ("pick_heat_then_place_in_recep", "egg", "garbagecan", {"egg 1": "fridge 1", "apple 1": "countertop 1"},
     ["go to fridge 1", "open fridge 1", "take egg 1 from fridge 1", "go to microwave 1", "heat egg 1 with microwave 1",
      "go to garbagecan 1", "move egg 1 to garbagecan 1"]),
    ("pick_cool_then_place_in_recep", "apple", "countertop", {"apple 1": "shelf 1", "apple 2": "drawer 1"},
     ["go to shelf 1", "take apple 1 from shelf 1", "go to fridge 1", "cool apple 1 with fridge 1",
      "go to countertop 1", "move apple 1 to countertop 1"]),
    ("pick_two_obj_and_place", "saltshaker", "drawer", {"saltshaker 1": "cabinet 2", "saltshaker 2": "countertop 1"},
     ["go to countertop 1", "take saltshaker 2 from countertop 1", "go to drawer 1", "open drawer 1",
      "move saltshaker 2 to drawer 1", "go to cabinet 2", "open cabinet 2", "take saltshaker 1 from cabinet 2",
      "go to drawer 1", "move saltshaker 1 to drawer 1"]),
]


def pddl_name(cls):
    return PDDL_NAMES.get(cls, cls.capitalize())


def pddl_id(name):
    """'shelf 1' -> the id that the engine shows as 'shelf 1'; it numbers the ids of a class in falling order."""
    cls, number = name.split()
    place = f"_bar_{9 - int(number)}"
    return f"Sink{place}_bar_SinkBasin" if cls == "sinkbasin" else pddl_name(cls) + place


def pddl_problem(where, goal):
    kinds = {"object": sorted({name.split()[0] for name in where} | {"knife"}),
             "receptacle": sorted({name.split()[0] for name in RECEPTACLES})}
    things = ["agent1 - agent", "ButterKnifeType - otype", "loc_bar_0 - location"]
    things += [f"{pddl_name(cls)}Type - otype" for cls in kinds["object"]]
    things += [f"{pddl_name(cls)}Type - rtype" for cls in kinds["receptacle"]]
    init = ["= (total-cost) 0", "atLocation agent1 loc_bar_0"]
    init += [f"canContain {pddl_name(r)}Type {pddl_name(o)}Type" for r in kinds["receptacle"] for o in kinds["object"]]
    for number, name in enumerate(RECEPTACLES, 1):
        r, cls = pddl_id(name), name.split()[0]
        things += [f"{r} - receptacle", f"loc_bar_{number} - location"]
        init += [f"receptacleType {r} {pddl_name(cls)}Type", f"receptacleAtLocation {r} loc_bar_{number}"]
        init += [f"openable {r}"] if cls in OPENABLE else []
    for name, place in where.items():
        o, cls = pddl_id(name), name.split()[0]
        things.append(f"{o} - object")
        init += [f"objectType {o} {pddl_name(cls)}Type", f"inReceptacle {o} {pddl_id(place)}",
                 f"objectAtLocation {o} loc_bar_{RECEPTACLES.index(place) + 1}"]
        init += [f"{what} {o}" for what in (["toggleable"] if cls == "desklamp" else
                                            ["pickupable", "cleanable", "heatable", "coolable"])]
    objects, facts = "\n".join(things), "\n".join(f"({fact})" for fact in init)
    return f"(define (problem household)\n(:domain alfred)\n(:objects\n{objects})\n(:init\n{facts})\n{goal}"


def old_wording(text):
    """A grammar of the installed engine as the published json_2.1.1 games and the older transcripts word it."""
    for new, old in (("You arrive at {r.name}.", "You arrive at {lend.name}."),
                     ("move {o} to {r}", "put {o} in/on {r}"),
                     ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}.")):
        assert new in text
        text = text.replace(new, old)
    return text


def make_games(data_dir, splits=("valid_seen",), legacy=False):
    """Write the six games into each split below `data_dir`, which then is what ALFWORLD_DATA has to name; returns it.
    legacy: with the wording of the published files. Each game's walkthrough is in its own wording."""
    os.environ.setdefault("ALFWORLD_DATA", str(data_dir))   # importing alfworld makes a folder at home otherwise
    from alfworld.gen.goal_library import gdict
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
    with open(ALFRED_PDDL_PATH) as domain_file, open(ALFRED_TWL2_PATH) as grammar_file:
        domain, grammar = domain_file.read(), grammar_file.read()
    if legacy:
        grammar = old_wording(grammar)
    for split in splits:
        for number, (kind, obj, place, where, walkthrough) in enumerate(GAMES):
            goal = gdict[kind]["pddl"].format(obj=pddl_name(obj), recep=pddl_name(place), toggle=pddl_name(place))
            text = gdict[kind]["templates"][0].format(obj=obj, recep=place, toggle=place)
            if legacy:
                walkthrough = [a.replace("move ", "put ").replace(" to ", " in/on ") if a.startswith("move ") else a
                               for a in walkthrough]
            game = {"pddl_domain": domain, "grammar": grammar.replace("UNKNOWN GOAL", text), "solvable": True,
                    "pddl_problem": pddl_problem(where, goal.replace("#", "-")), "walkthrough": walkthrough}
            folder = os.path.join(data_dir, "json_2.1.1", split, f"{kind}-{pddl_name(obj)}-None-{pddl_name(place)}-1",
                                  f"trial_{number}")
            os.makedirs(folder)
            for name, content in (("game.tw-pddl", game), ("traj_data.json", {"task_type": kind})):
                with open(os.path.join(folder, name), "w") as f:
                    json.dump(content, f)
    return str(data_dir)
