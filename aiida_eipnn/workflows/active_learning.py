"""The loop: EIPs label a pool, DFT a few, networks learn from both and ask for more."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aiida.common import AttributeDict
from aiida.common.links import LinkType
from aiida.engine import ExitCode, ProcessBuilder, ProcessSpec, ToContext, if_, while_
from aiida.orm import ArrayData, Computer, Data, Dict, ProcessNode, Str
from aiida_quantumespresso.workflows.protocols.utils import ProtocolMixin

from aiida_eipnn.calculations import loop
from aiida_eipnn.calculations.base import JobCalculation
from aiida_eipnn.calculations.evaluate import EvaluateCalculation
from aiida_eipnn.calculations.explore import ExploreCalculation
from aiida_eipnn.calculations.loop import INITIAL, KNOWN, LAST, REFUSED, TEST, TWINS
from aiida_eipnn.calculations.upload import UploadCalculation
from aiida_eipnn.data.choice import ChoiceData
from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.jobs.spec import PARENT_FOLDER
from aiida_eipnn.science.extension import COMMITTEE, ExtensionParameters
from aiida_eipnn.science.verdict import SCORE
from aiida_eipnn.workflows import loop_ports
from aiida_eipnn.workflows.builder import PROTOCOLS, Codes, Start, fill_builder
from aiida_eipnn.workflows.continuation import fill_continuation, must_train, runs_of
from aiida_eipnn.workflows.folders import clean_folder, computer_of, missing_uploads, upload_name
from aiida_eipnn.workflows.label_dft import DftLabelWorkChain
from aiida_eipnn.workflows.once import SubmitsOnce
from aiida_eipnn.workflows.restart import (
    MAX_DEATHS,
    LabelBaseWorkChain,
    TrainBaseWorkChain,
    died,
    lacked_inputs,
    was_interrupted,
)


class ActiveLearningWorkChain(ProtocolMixin, SubmitsOnce):
    """Train a committee on EIP and DFT labels, with as few DFT points as it needs."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        """Define the process specification."""
        super().define(spec)
        loop_ports.add_inputs(spec)
        loop_ports.add_outputs(spec)
        loop_ports.add_exit_codes(spec)
        spec.outline(
            cls.setup,
            while_(cls.should_explore)(cls.explore, cls.inspect_explore),
            cls.refuse,
            if_(cls.should_label_with_eips)(cls.label_with_eips, cls.inspect_eip_labels),
            cls.set_apart_twins,
            cls.split,
            if_(cls.should_label_test)(cls.label_test_with_dft, cls.inspect_test_labels),
            if_(cls.should_label_initial)(cls.label_initial_with_dft, cls.inspect_initial_labels),
            if_(cls.should_upload)(cls.upload, cls.inspect_uploads),
            if_(cls.should_pretrain)(cls.pretrain, cls.inspect_pretrain),
            if_(cls.should_reconsider)(cls.reconsider),
            while_(cls.should_continue)(
                if_(cls.should_train)(
                    if_(cls.should_upload)(cls.upload, cls.inspect_uploads),
                    cls.classify,
                    cls.inspect_classify,
                    cls.finetune,
                    cls.inspect_finetune,
                    while_(cls.should_evaluate)(cls.evaluate, cls.inspect_evaluate),
                    cls.assess,
                ),
                if_(cls.should_continue)(
                    cls.acquire,
                    cls.label_with_dft,
                    cls.inspect_labels,
                    while_(cls.should_extend)(cls.extend, cls.inspect_extension),
                    if_(cls.has_found)(cls.label_found_with_eips, cls.inspect_found_labels),
                ),
            ),
            cls.results,
        )

    @classmethod
    def get_protocol_filepath(cls) -> Path:
        """Return the file that defines the protocols."""
        return PROTOCOLS

    @classmethod
    def get_builder_from_protocol(
        cls,
        codes: Codes,
        start: Start,
        protocol: str | None = None,
        overrides: Mapping[str, Any] | Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> ProcessBuilder:
        """Return a builder with every input filled in from a protocol.

        Parameters
        ----------
        codes
            The codes that run pw.x and ``eipnn-job``.
        start
            What to start from: seed structures or a pool, EIPs, and labels that are there.
        protocol
            ``demo``, ``fast``, ``balanced`` or ``stringent``; see ``get_available_protocols``.
        overrides
            Values that replace those of the protocol, nested as in its YAML file.
        options
            ``metadata.options`` for every job (queue, account, walltime), and below ``explore``,
            ``label``, ``dft``, ``train``, ``evaluate`` those of the jobs of one stage.

        Raises
        ------
        ValueError
            If the protocol is unknown, if an element has no pseudopotential or no EIPs.
        """
        inputs = cls.get_protocol_inputs(protocol, overrides)
        return fill_builder(cls.get_builder(), inputs, codes, start, dict(options or {}))

    @classmethod
    def get_builder_continue(
        cls,
        loop: ProcessNode,
        overrides: Mapping[str, Any] | None = None,
        known_configurations: ConfigurationsData | None = None,
        known_labels: LabelsData | None = None,
        is_lost: bool = False,
    ) -> ProcessBuilder:
        """Return a builder that goes on where a loop ended or broke, without repeating DFT.

        Parameters
        ----------
        loop
            The loop: finished, failed, killed, or excepted.
        overrides
            Values that replace those of the loop, nested as in the YAML file of the protocols.
            What the labels depend on (``split``, ``gate``, the level of theory) cannot be changed.
        known_configurations, known_labels
            More configurations with DFT labels, to learn from the next training on.
        is_lost
            Whether the process that ran the loop is gone, though the database says that it runs.

        Raises
        ------
        ValueError
            If the loop runs, if it would stop at once, or if an override cannot be used.
        """
        given = (known_configurations, known_labels)
        return fill_continuation(cls.get_builder(), loop, overrides or {}, given, is_lost)

    # The steps, in the order of the outline.

    def setup(self) -> None:
        """Start counting, from where a previous loop came to."""
        self.ctx.known = AttributeDict(self.inputs.get("known", {}))
        self.ctx.previous = AttributeDict(self.inputs.get("previous", {}))
        self.ctx.choices = dict(self.ctx.previous.get("choices", {}))
        self.ctx.labels = dict(self.ctx.previous.get("labels", {}))
        if TEST in self.ctx.labels:
            self.ctx.test_labels = self.ctx.labels.pop(TEST)
            self.out("test_labels", self.ctx.test_labels)
        if INITIAL in self.ctx.labels:
            self.out("initial_labels", self.ctx.labels[INITIAL])
        for name in ("eip_labels", "pretrained", *LAST):
            if name in self.ctx.previous:
                self.ctx[name] = self.ctx.previous[name]
        for name in ("eip_labels", "pretrained"):
            # EIP labels of labels that the user brings are still to come.
            if name in self.ctx and not (name == "eip_labels" and "labels" in self.ctx.known):
                self.out(name, self.ctx[name])
        if "predictions" in self.ctx:
            # By these the last batch was asked for, or is to be.
            self.ctx.asked_by = self.ctx.predictions
        self.ctx.uploads = {}
        self.ctx.iteration = len(self.ctx.history["iterations"]) if "history" in self.ctx else 0
        self.ctx.must_train = must_train(self.ctx.previous, self.ctx.known)
        if "pool" in self.inputs:
            self.ctx.pool = self.inputs.pool

    def should_explore(self) -> bool:
        """Make a pool unless one is given, or made."""
        return "pool" not in self.ctx

    def explore(self) -> ToContext:
        """Make the pool."""
        inputs = AttributeDict(self.exposed_inputs(ExploreCalculation, namespace="explore"))
        self.report("pool: making configurations")
        return ToContext(explored=self._submit_job(ExploreCalculation, inputs, "explore"))

    def inspect_explore(self) -> ExitCode | None:
        """Take the pool, unless the job that makes it has to go on."""
        if self._starts_again(self.ctx.explored):
            return None
        if broken := self._broken(self.ctx.explored, "EXPLORE"):
            return broken
        self.ctx.pool = self.ctx.explored.outputs.pool
        self._tidy(self.ctx.explored)
        return None

    def refuse(self) -> ExitCode | None:
        """Refuse what cannot be right, before anything is spent on it."""
        if "pool" not in self.inputs:
            self.out("pool", self.ctx.pool)
        if REFUSED in self.ctx.choices:
            return None
        refused, broken = self._steer("SPLIT", loop.refuse, self.ctx.pool, self.inputs.gate)
        if broken:
            return broken
        self.ctx.choices[REFUSED] = refused
        if len(refused):
            self.report(f"gate: {len(refused)} configurations of the pool are refused")
        return None

    def should_label_with_eips(self) -> bool:
        """Label the pool, and labels that the user brings, unless a previous loop did."""
        return "eip_labels" not in self.ctx or "labels" in self.ctx.known

    def label_with_eips(self) -> ToContext:
        """Let every EIP label the pool."""
        inputs = AttributeDict(self.exposed_inputs(LabelBaseWorkChain, namespace="label"))
        inputs.job.configurations = self._configurations()
        if "eip_labels" in self.ctx:
            inputs.job.configurations = {KNOWN: self.ctx.known.configurations}
        inputs.job.exclude = {REFUSED: self.ctx.choices[REFUSED]}
        self.report(
            f"EIP labels: {len(inputs.job.eips.get_list())} EIPs, "
            f"{len(self.ctx.pool)} configurations in the pool"
        )
        return ToContext(eips=self.submit(LabelBaseWorkChain, **_named(inputs, "label_with_eips")))

    def inspect_eip_labels(self) -> ExitCode | None:
        """Take the EIP labels, and hold given DFT labels against them."""
        if broken := self._broken(self.ctx.eips, "EIP_LABELS"):
            return broken
        made = self.ctx.eips.outputs.labels
        if "eip_labels" in self.ctx:
            made = loop.add_eip_labels(self.ctx.eip_labels, made)
        self.ctx.eip_labels = made
        self.out("eip_labels", self.ctx.eip_labels)
        facts = self.ctx.eip_labels.base.attributes
        self.report(f"EIP labels: {facts.get('n_labels')} made, {facts.get('n_failures')} failed")
        return self._take_known() if "labels" in self.ctx.known else None

    def _take_known(self) -> ExitCode | None:
        outputs, node = loop.check_given_labels.run_get_node(
            self.ctx.known.configurations,
            self.ctx.known.labels,
            self.ctx.eip_labels,
            **self._taken(),
        )
        if not node.is_finished_ok:
            return self.exit_codes.ERROR_KNOWN_LABELS.format(message=node.exit_message)
        self.report(f"known DFT labels: {outputs['report']['text']}")
        if n_before := outputs["report"]["n_chosen_before"]:
            self.report(f"known DFT labels: {n_before} are left out, they were chosen before")
        return self._add_known(outputs) if "labels" in outputs else None

    def _add_known(self, outputs: Mapping[str, Any]) -> ExitCode | None:
        taken, broken = outputs, None
        if KNOWN in self.ctx.labels:
            taken, broken = self._steer(
                "KNOWN_LABELS", loop.add_known, self.ctx.labels[KNOWN], outputs["labels"]
            )
        if broken:
            return broken
        self.ctx.labels[KNOWN] = taken["labels"]
        self.ctx.choices[KNOWN] = taken["choice"]
        return None

    def set_apart_twins(self) -> None:
        """Set apart what is another configuration moved, turned, mirrored or repeated."""
        if TWINS not in self.ctx.choices:
            self._set_apart_twins()

    def _set_apart_twins(self) -> None:
        twins = loop.set_apart_twins(self.ctx.pool, self.ctx.eip_labels)
        self.ctx.choices[TWINS] = twins
        if len(twins):
            self.report(f"twins: {len(twins)} configurations of the pool are others over again")

    def split(self) -> ExitCode | None:
        """Hold out the test set and choose the first DFT points."""
        if TEST in self.ctx.choices:
            return None
        chosen, broken = self._steer(
            "SPLIT",
            loop.split_pool,
            self.ctx.pool,
            self.inputs.split,
            self.inputs.seed,
            self.ctx.eip_labels,
            **self._taken(),
        )
        if broken:
            return broken
        self.ctx.choices.update(chosen)
        return None

    def should_label_test(self) -> bool:
        """Label the test set unless a previous loop did."""
        return "test_labels" not in self.ctx

    def label_test_with_dft(self) -> ToContext:
        """Label the held-out test set."""
        return ToContext(test=self._submit_dft(TEST))

    def inspect_test_labels(self) -> ExitCode | None:
        """Keep the test labels apart: only `assess` ever sees them."""
        if "labels" in self.ctx.test.outputs:
            self.ctx.test_labels = self._gated(self.ctx.test.outputs.labels)
            self.out("test_labels", self.ctx.test_labels)
        return self._broken(self.ctx.test, "DFT_LABELS")

    def should_label_initial(self) -> bool:
        """Start from DFT points of the pool, if any are asked for."""
        is_asked = INITIAL in self.ctx.choices and len(self.ctx.choices[INITIAL]) > 0
        return is_asked and INITIAL not in self.ctx.labels

    def label_initial_with_dft(self) -> ToContext:
        """Label the first DFT points."""
        return ToContext(initial=self._submit_dft(INITIAL))

    def inspect_initial_labels(self) -> ExitCode | None:
        """Take the first DFT labels."""
        if "labels" in self.ctx.initial.outputs:
            self.ctx.labels[INITIAL] = self._gated(self.ctx.initial.outputs.labels)
            self.out("initial_labels", self.ctx.labels[INITIAL])
        return self._broken(self.ctx.initial, "DFT_LABELS")

    def should_upload(self) -> bool:
        """Put what is large where the jobs are, unless it is there."""
        return bool(self._missing_uploads())

    def upload(self) -> None:
        """Put the pool and the EIP labels on the computers whose jobs read them again and again."""
        for name, (node, computer) in self._missing_uploads().items():
            inputs = {"node": node, "metadata": {"computer": computer, "call_link_label": name}}
            self.to_context(**{name: self.submit(UploadCalculation, **inputs)})

    def inspect_uploads(self) -> None:
        """Take what is there now; what could not be put there is sent with each job."""
        for name in self._missing_uploads():
            process = self.ctx[name]
            is_there = process.is_finished_ok
            self.ctx.uploads[name] = process.outputs.remote_folder if is_there else None
            if not is_there:
                self.report(f"uploading failed, each job gets its own copy: {_why(process)}")

    def should_pretrain(self) -> bool:
        """Pre-train unless a previous loop did."""
        return "pretrained" not in self.ctx

    def pretrain(self) -> ToContext:
        """Teach the networks what the EIPs say about the pool."""
        self.report("pre-training on EIP labels")
        inputs = self._train_inputs("pretrain")
        if "pretrain_seeds" in self.inputs:
            inputs.job.seeds = self.inputs.pretrain_seeds
        inputs.job.eip_labels = {"pool": self.ctx.eip_labels}
        return ToContext(pretraining=self._submit_train(inputs, "pretrain"))

    def inspect_pretrain(self) -> ExitCode | None:
        """Take the pre-trained committee."""
        if broken := self._broken(self.ctx.pretraining, "PRETRAIN"):
            return broken
        self.ctx.pretrained = self.ctx.pretraining.outputs.committee
        self.out("pretrained", self.ctx.pretrained)
        return None

    def should_reconsider(self) -> bool:
        """Judge anew what a previous loop came to, unless it chose DFT points by that."""
        return "history" in self.ctx and self._name() not in self.ctx.choices

    def reconsider(self) -> ExitCode | None:
        """Look for a reason to stop by the criteria of now."""
        return self._assess(
            loop.reconsider,
            self.ctx.history,
            self.ctx.predictions,
            self.inputs.acquisition,
            self.inputs.stop,
        )

    def should_continue(self) -> bool:
        """Go on until the last assessment gave a reason to stop."""
        return "history" not in self.ctx or self.ctx.history["stop"] is None

    def should_train(self) -> bool:
        """Train unless a previous loop did, and broke or stopped after that."""
        return bool(self.ctx.must_train)

    def classify(self) -> ToContext:
        """Learn which EIP to believe where."""
        self.ctx.iteration += 1
        n_labels = sum(node.base.attributes.get("n_labels") for node in self.ctx.labels.values())
        self.report(f"iteration {self.ctx.iteration}: choosing EIPs by {n_labels} DFT labels")
        inputs = self._train_inputs("classify")
        inputs.job.labels = dict(self.ctx.labels)
        inputs.job.eip_labels = {"pool": self.ctx.eip_labels}
        inputs.job.committee = self.ctx.pretrained
        return ToContext(classifying=self._submit_train(inputs, "classify"))

    def inspect_classify(self) -> ExitCode | None:
        """Take the choice of EIPs."""
        if broken := self._broken(self.ctx.classifying, "CLASSIFY"):
            return broken
        self.ctx.selection = self.ctx.classifying.outputs.selection
        self._emit("selection", self.ctx.selection)
        return None

    def finetune(self) -> None:
        """Fine-tune the committee on DFT labels, beside a twin that starts from scratch."""
        twin = " and its twin from scratch" if self.inputs.train_scratch else ""
        self.report(f"fine-tuning the committee{twin}")
        inputs = self._train_inputs("finetune")
        inputs.job.labels = dict(self.ctx.labels)
        if self.inputs.train_scratch:
            scratch = self._train_inputs("scratch")
            scratch.job.labels = dict(self.ctx.labels)
            self.to_context(scratch=self._submit_train(scratch, "scratch"))
        inputs.job.committee = self.ctx.pretrained
        # Replay: what the EIPs say stays in the loss.
        inputs.job.eip_labels = {"pool": self.ctx.eip_labels}
        if self.inputs.use_pseudo_labels:
            inputs.job.pseudo_labels = self.inputs.label_model
        self.to_context(finetuning=self._submit_train(inputs, "finetune"))

    def inspect_finetune(self) -> ExitCode | None:
        """Take the committee, and judge by held-out labels whether it or its twin is used."""
        if broken := self._broken(self.ctx.finetuning, "FINETUNE"):
            return broken
        self.ctx.committee = self.ctx.finetuning.outputs.committee
        self._emit("committee", self.ctx.committee)
        self.ctx.verdict = None
        if self.inputs.train_scratch:
            if broken := self._broken(self.ctx.scratch, "FINETUNE"):
                return broken
            self._emit("scratch", self.ctx.scratch.outputs.committee)
            self._judge(self.ctx.finetuning.outputs.metrics, self.ctx.scratch.outputs.metrics)
        return None

    def _judge(self, metrics: Dict, scratch_metrics: Dict) -> None:
        if SCORE in metrics.get_dict() and SCORE in scratch_metrics.get_dict():
            self.ctx.verdict = loop.judge(metrics, scratch_metrics)
            self._emit("verdict", self.ctx.verdict)
            self.report(f"verdict: {self.ctx.verdict['text']}")

    def should_evaluate(self) -> bool:
        """Evaluate once in each iteration, until the jobs are done."""
        return self.ctx.get("evaluated", 0) < self.ctx.iteration

    def evaluate(self) -> None:
        """Ask the committee, and its twin, about the whole pool."""
        self._evaluate("evaluation", self.ctx.committee, "evaluate")
        if self.inputs.train_scratch:
            twin = self.ctx.scratch.outputs.committee
            self._evaluate("scratch_evaluation", twin, "evaluate_scratch")

    def inspect_evaluate(self) -> ExitCode | None:
        """Take the predictions, unless a job that makes them has to go on."""
        if self._evaluations_start_again():
            return None
        self.ctx.evaluated = self.ctx.iteration
        if broken := self._broken(self.ctx.evaluation, "EVALUATE"):
            return broken
        self._tidy(self.ctx.evaluation)
        self.ctx.predictions = self.ctx.evaluation.outputs.predictions
        self._emit("predictions", self.ctx.predictions)
        if self.inputs.train_scratch:
            if broken := self._broken(self.ctx.scratch_evaluation, "EVALUATE"):
                return broken
            self._tidy(self.ctx.scratch_evaluation)
            self._emit("scratch_predictions", self.ctx.scratch_evaluation.outputs.predictions)
            if self.ctx.verdict is not None and not self.ctx.verdict["eips_help"]:
                self.ctx.finetuned = self.ctx.predictions
                self.ctx.predictions = self.ctx.scratch_evaluation.outputs.predictions
                self.ctx.committee = self.ctx.scratch.outputs.committee
        return None

    def assess(self) -> ExitCode | None:
        """Measure the errors on the test set and look for a reason to stop."""
        more = {f"{loop.LABELS}{key}": node for key, node in self.ctx.labels.items()}
        if self.inputs.train_scratch:
            more["scratch"] = self.ctx.scratch_evaluation.outputs.predictions
        if self.ctx.verdict is not None:
            more["verdict"] = self.ctx.verdict
            if not self.ctx.verdict["eips_help"]:
                more["finetuned"] = self.ctx.finetuned
        if "history" in self.ctx:
            more |= {"previous": self.ctx.history, "asked": self.ctx.asked_by}
        return self._assess(
            loop.assess,
            self.ctx.pool,
            self.ctx.predictions,
            self.ctx.test_labels,
            self.ctx.eip_labels,
            self.inputs.acquisition,
            self.inputs.stop,
            **more,
        )

    def _assess(
        self, function: Callable[..., Any], *arguments: Data, **more: Data
    ) -> ExitCode | None:
        history, broken = self._steer("ASSESS", function, *arguments, **more, **self._taken())
        if broken:
            return broken
        self.ctx.history = history
        self._emit("history", history)
        self._report_errors(history["iterations"][-1])
        if history["stop"]:
            self.report(f"stop: {history['stop']['text']}")
        return None

    def acquire(self) -> ExitCode | None:
        """Choose the next DFT points, unless a previous loop did and broke over their labels."""
        if self._name() in self.ctx.choices:
            return None
        choice, broken = self._steer(
            "ACQUIRE",
            loop.acquire,
            self.ctx.pool,
            self.ctx.predictions,
            self.inputs.acquisition,
            self.inputs.stop,
            self.ctx.history,
            self.inputs.seed,
            # By that DFT costs more or less.
            self.inputs.dft.get("pw_base", {}).get("kpoints_distance"),
            **self._taken(),
        )
        if broken:
            return broken
        self.ctx.asked_by = self.ctx.predictions
        self.ctx.choices[self._name()] = choice
        self._emit("choice", choice)
        return None

    def label_with_dft(self) -> ToContext:
        """Label the chosen configurations."""
        return ToContext(asked=self._submit_dft(self._name()))

    def inspect_labels(self) -> ExitCode | None:
        """Take the new DFT labels; after a bad batch the loop goes on with what it has."""
        if "labels" not in self.ctx.asked.outputs:
            return self._broken(self.ctx.asked, "DFT_LABELS")
        if not self.ctx.asked.is_finished_ok:
            self.report(f"DFT labels: {self.ctx.asked.exit_message}")
        self.ctx.labels[self._name()] = self._gated(self.ctx.asked.outputs.labels)
        self._emit("labels", self.ctx.labels[self._name()])
        self.ctx.must_train = True
        return None

    def should_extend(self) -> bool:
        """Explore on, where that was asked for, until the job is done."""
        if "extend" not in self.inputs or self.ctx.get("extended", 0) == self.ctx.iteration:
            return False
        every = ExtensionParameters.from_dict(self.inputs.extension.get_dict()).every
        return self.ctx.iteration % every == 0

    def extend(self) -> ToContext | ExitCode:
        """Look for new configurations, with the committee once it is to be trusted."""
        inputs = AttributeDict(self.exposed_inputs(ExploreCalculation, namespace="extend"))
        planned, broken = self._steer(
            "EXPLORE",
            loop.plan_exploration,
            inputs.recipes,
            inputs.seed,
            inputs.get("eip", Str("")),
            self.inputs.extension,
            self.inputs.acquisition,
            self.ctx.history,
        )
        if broken:
            return broken
        inputs.recipes, inputs.seed = planned["recipes"], planned["seed"]
        if planned["driver"] == COMMITTEE:
            inputs.pop("eip", None)
            inputs.committee = self.ctx.committee
        self.report(f"exploring; the {planned['driver'].value} drives molecular dynamics")
        return ToContext(explored=self._submit_job(ExploreCalculation, inputs, "extend"))

    def inspect_extension(self) -> None:
        """Take what is new; an exploration that breaks leaves the pool as it is."""
        if self._starts_again(self.ctx.explored):
            return
        self.ctx.extended = self.ctx.iteration
        if not self.ctx.explored.is_finished_ok:
            self.report(f"exploring broke, the pool stays as it is: {_why(self.ctx.explored)}")
            return
        self._tidy(self.ctx.explored)
        found = loop.keep_new(self.ctx.pool, self.ctx.explored.outputs.pool, self.inputs.gate)
        refused = found.base.attributes.get("refused")
        self.report(f"exploring: {len(found)} new configurations, {len(refused)} refused")
        self.ctx.found = found if len(found) else None

    def has_found(self) -> bool:
        """Whether there is anything new."""
        return self.ctx.get("found") is not None

    def label_found_with_eips(self) -> ToContext:
        """Let every EIP label what is new."""
        inputs = AttributeDict(self.exposed_inputs(LabelBaseWorkChain, namespace="label"))
        inputs.job.configurations = {"pool": self.ctx.found}
        return ToContext(eips=self.submit(LabelBaseWorkChain, **_named(inputs, "label_found")))

    def inspect_found_labels(self) -> ExitCode | None:
        """Extend the pool."""
        if broken := self._broken(self.ctx.eips, "EIP_LABELS"):
            return broken
        extended = loop.extend_pool(
            self.ctx.pool, self.ctx.found, self.ctx.eip_labels, self.ctx.eips.outputs.labels
        )
        self.ctx.pool, self.ctx.eip_labels = extended["pool"], extended["eip_labels"]
        self._set_apart_twins()
        self.ctx.found = None
        self._emit("pool", self.ctx.pool)
        self._emit("eip_labels", self.ctx.eip_labels)
        return None

    def results(self) -> None:
        """Emit what the last iteration made."""
        for name in LAST:
            self.out(name, self.ctx[name])

    def on_terminated(self) -> None:
        """Remove what was put on other computers for the jobs of this loop."""
        super().on_terminated()
        for job in self.node.called:
            if job.process_class is UploadCalculation:
                clean_folder(self, job)

    # Pieces of the steps.

    def _name(self) -> str:
        return loop.iteration_name(self.ctx.iteration)

    def _emit(self, name: str, node: Data) -> None:
        # At once, so that a loop that breaks later still has it.
        self.out(f"iterations.{self._name()}.{name}", node)

    def _gated(self, labels: LabelsData) -> LabelsData:
        """Return new DFT labels without those that the gate refuses, and say which."""
        kept: LabelsData = loop.refuse_dft_labels(
            self.ctx.pool, labels, self.ctx.eip_labels, **self.ctx.labels
        )
        found = kept.base.attributes.get("gate")
        if found["problem"]:
            # What pw.x gives has the right unit: then the EIPs are far off, which is worth knowing.
            self.report(f"gate: the EIPs and DFT do not fit together: {found['problem']}")
        if found["reasons"]:
            first = next(iter(found["reasons"].values()))
            self.report(f"gate: DFT labels: {found['text']}; first: {first}")
        return kept

    def _taken(self) -> dict[str, ChoiceData]:
        return {f"{loop.TAKEN}{key}": node for key, node in self.ctx.choices.items()}

    def _configurations(self) -> dict[str, ConfigurationsData]:
        known = {KNOWN: self.ctx.known.configurations} if "labels" in self.ctx.known else {}
        return {"pool": self.ctx.pool, **self.ctx.previous.get("known", {}), **known}

    def _submit_dft(self, name: str) -> ProcessNode:
        choice = self.ctx.choices[name]
        inputs = AttributeDict(self.exposed_inputs(DftLabelWorkChain, namespace="dft"))
        inputs.configurations = self.ctx.pool
        inputs.choice = choice
        if runs := runs_of(self.ctx.previous.get("runs", {}), choice):
            inputs.runs = runs
        self.report(f"DFT labels: {len(choice)} configurations ({name})")
        return self.submit(DftLabelWorkChain, **_named(inputs, f"dft_{name}"))

    def _missing_uploads(self) -> dict[str, tuple[ArrayData, Computer]]:
        train = computer_of(self.inputs.train.job)
        evaluate = computer_of(self.inputs.evaluate)
        wanted = ((self.ctx.pool, train), (self.ctx.eip_labels, train), (self.ctx.pool, evaluate))
        return missing_uploads(wanted, self.ctx.uploads, self.inputs.upload_above)

    def _uploaded(self, computer: Computer) -> dict[str, str]:
        """Return which of the nodes of now are on a computer already."""
        nodes = {"pool": self.ctx.pool, "eip_labels": self.ctx.eip_labels}
        folders = {
            name: self.ctx.uploads.get(upload_name(node, computer)) for name, node in nodes.items()
        }
        return {name: folder.uuid for name, folder in folders.items() if folder is not None}

    def _tidy(self, job: ProcessNode) -> None:
        """Remove the folder of a job, and of those that it went on from."""
        if self.inputs.clean_workdir:
            clean_folder(self, job)
            if PARENT_FOLDER in job.inputs:
                self._tidy(job.inputs[PARENT_FOLDER].creator)

    def _train_inputs(self, name: str) -> AttributeDict:
        inputs = AttributeDict(self.exposed_inputs(TrainBaseWorkChain, namespace="train"))
        inputs.job.training = self.inputs[name]
        inputs.job.configurations = self._configurations()
        inputs.job.exclude = {name: self.ctx.choices[name] for name in (TEST, REFUSED)}
        inputs.job.uploaded = self._uploaded(computer_of(inputs.job))
        return inputs

    def _submit_train(self, inputs: AttributeDict, label: str) -> ProcessNode:
        return self.submit(TrainBaseWorkChain, **_named(inputs, label))

    def _evaluate(self, name: str, committee: CommitteeData, label: str) -> None:
        """Ask a committee about the pool, unless it has been asked."""
        job = self.ctx.get(name)
        is_done = job is not None and job.is_finished_ok
        if not is_done or job.inputs.committee.uuid != committee.uuid:
            self.to_context(**{name: self._submit_evaluate(committee, label)})

    def _submit_evaluate(self, committee: CommitteeData, label: str) -> ProcessNode:
        inputs = AttributeDict(self.exposed_inputs(EvaluateCalculation, namespace="evaluate"))
        inputs.configurations = {"pool": self.ctx.pool}
        inputs.exclude = {REFUSED: self.ctx.choices[REFUSED]}
        inputs.committee = committee
        inputs.uploaded = self._uploaded(computer_of(inputs))
        return self._submit_job(EvaluateCalculation, inputs, label)

    def _report_errors(self, record: Mapping[str, Any]) -> None:
        parts = [
            f"{name} {1000 * record[key]['energy_mae']:.1f} meV/atom, "
            f"{1000 * record[key]['forces_mae']:.0f} meV/Å"
            for name, key in (
                ("fine-tuned", "finetuned" if "finetuned" in record else "committee"),
                ("from scratch", "scratch"),
                ("best EIP", "best_eip"),
            )
            if record.get(key)
        ]
        self.report(f"test errors of iteration {record['iteration']}: " + "; ".join(parts))

    def _evaluations_start_again(self) -> bool:
        names = ("evaluation", "scratch_evaluation")
        jobs = [self.ctx[name] for name in names if name in self.ctx]
        # All are looked at: each may have a checkpoint.
        again = [self._starts_again(job) for job in jobs]
        return any(again)

    def _submit_job(
        self, process_class: type[JobCalculation], inputs: AttributeDict, label: str
    ) -> ProcessNode:
        """Submit a job that goes on where the last one of this step was interrupted, if it was."""
        inputs = _named(inputs, label)
        if interrupted := self.ctx.get("interrupted", {}).get(self._step(label)):
            inputs[PARENT_FOLDER] = interrupted.outputs.remote_folder
        return self.submit(process_class, **inputs)

    def _step(self, label: str) -> str:
        return f"{self._name()} {label}"

    def _goes_on(self, job: ProcessNode) -> bool:
        """Return whether an interrupted job came any further than the one before."""
        step = self._step(_call_of(job))
        interrupted = self.ctx.setdefault("interrupted", {})
        before, interrupted[step] = interrupted.get(step), job
        reached = job.outputs.checkpoint.get_dict()
        if before is not None and before.outputs.checkpoint.get_dict() == reached:
            self.report(f"{job.process_label} {job.pk} came no further than its checkpoint")
            return False
        self.report(f"{job.process_label} {job.pk} was interrupted: it goes on from its checkpoint")
        return True

    def _starts_again(self, job: ProcessNode) -> bool:
        """Return whether a job is worth another try: interrupted or killed; else it is final."""
        if was_interrupted(job):
            return self._goes_on(job)
        if lacked_inputs(job):
            self.report(f"{job.process_label} {job.pk} lacked inputs: they are put there again")
            self.ctx.uploads = {}
        elif not died(job):
            return False
        deaths = self.ctx.setdefault("deaths", {})
        step = self._step(_call_of(job))
        deaths[step] = deaths.get(step, 0) + 1
        if deaths[step] > MAX_DEATHS:
            return False
        self.report(f"{job.process_label} {job.pk} was killed: it starts again")
        return True

    def _broken(self, process: ProcessNode, name: str) -> ExitCode | None:
        if process.is_finished_ok:
            return None
        return self.exit_codes[f"ERROR_{name}"].format(message=_why(process))

    def _steer(
        self, name: str, function: Callable[..., Any], *arguments: Data, **more: Data
    ) -> tuple[Any, ExitCode | None]:
        """Run a calcfunction; what it says to the user becomes the exit message of the loop."""
        try:
            return function(*arguments, **more), None
        except (ValueError, KeyError) as error:
            return None, self.exit_codes[f"ERROR_{name}"].format(message=str(error))


def _why(process: ProcessNode) -> str:
    """Return which process did not end well, and why."""
    return f"process {process.pk}: {process.exit_message or process.process_state}"


def _call_of(job: ProcessNode) -> str:
    """Return the label of the link from the loop to one of its jobs."""
    return str(job.base.links.get_incoming(link_type=LinkType.CALL_CALC).one().link_label)


def _named(inputs: AttributeDict, label: str) -> AttributeDict:
    """Return ``inputs`` with the label of the link from the loop: history and lineage read it."""
    inputs.metadata = AttributeDict({**inputs.get("metadata", {}), "call_link_label": label})
    return inputs
