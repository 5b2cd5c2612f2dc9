from aiida_eipnn.reports.history import read_history


def test_x(make_loop, tmp_path):
    import time

    t = time.time()
    l = make_loop()
    print(time.time() - t)
    h = read_history(l.node)
    print(time.time() - t, h.stage, h.stop_text)
    from aiida_eipnn.reports.report import write_report

    write_report(l.node, "/tmp/rep/syn.html")
    print(time.time() - t)
    from aiida_eipnn.reports.lineage import trace, unexplained_inputs

    print(unexplained_inputs(l.committee, l.node))
    print(trace(l.node).to_dict()["eips"])
